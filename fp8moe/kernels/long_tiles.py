"""Kernel: the maxima of long token tiles, from those of the parts of 32 rows that a quantization kernel saw."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.kernels.numerics import maximum
from fp8moe.operands import BLOCK, TokenGroups

PART = 32
"""Rows of which one maximum is measured: what a program of `quantize_swiglu_to_rows_kernel` sees."""


@triton.jit
def long_tile_amax_kernel(
    part_amax,  # fp32 (CAPACITY / PART, NUM_FEATURES)
    row_expert, padded_ends,  # TokenGroups
    tile_amax,  # fp32 (CAPACITY / 128, NUM_FEATURES)
    NUM_FEATURES,
    TOKEN_TILE: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,  # MASKED: features in no whole blocks of 128
):  # fmt: skip
    """If a tile begins at this block of 128 padded rows, one program does 128 features of it."""
    feature_blocks = tl.cdiv(NUM_FEATURES, 128) if MASKED else NUM_FEATURES // 128
    row_start = tl.program_id(0) // feature_blocks * 128
    features = tl.program_id(0) % feature_blocks * 128 + tl.arange(0, 128)
    expert = tl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    if expert < 0:
        return
    group_start = tl.load(padded_ends + expert - 1, mask=expert > 0, other=0)
    group_end = tl.load(padded_ends + expert)
    if (row_start - group_start) % TOKEN_TILE != 0:
        return

    parts = row_start + PART * tl.arange(0, TOKEN_TILE // PART)
    offsets = (parts // PART).to(tl.int64)[:, None] * NUM_FEATURES + features[None, :]
    inside = (parts < group_end)[:, None]
    if MASKED:
        inside = inside & (features < NUM_FEATURES)[None, :]
    amax = tl.reduce(tl.load(part_amax + offsets, mask=inside, other=0.0), 0, maximum)
    for block_start in tl.static_range(0, TOKEN_TILE, 128):
        block = (row_start + block_start) // 128
        inside = block * 128 < group_end
        if MASKED:
            inside = inside & (features < NUM_FEATURES)
        tl.store(tile_amax + block.to(tl.int64) * NUM_FEATURES + features, amax, mask=inside)


def launch_long_tile_amax(part_amax: Tensor, groups: TokenGroups, token_tile: int, tile_amax: Tensor) -> None:
    """The `amax` of `LongTiles` from the maxima of each 32 padded rows, fp32 `(R/32, D)`."""
    num_blocks, num_features = tile_amax.shape
    programs = num_blocks * ceil_div(num_features, BLOCK)
    if programs:
        launch(
            long_tile_amax_kernel, programs,
            part_amax, groups.row_expert, groups.padded_ends, tile_amax, num_features,
            TOKEN_TILE=token_tile, PART=PART, MASKED=num_features % BLOCK != 0,
            num_warps=4,
        )  # fmt: skip
