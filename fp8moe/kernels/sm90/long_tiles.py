"""Kernel: what `activations.py` does where token tiles are longer than 128, for Hopper.

The scale of a tile is known once all its rows have been seen, which do not fit in the registers. So a program reads its
tile twice, block by block: first for the maxima, and for the rows, whose scales need no more than a row; then for the
tokens. The second time most of it comes from L2. On an H200 (32768 rows, 7168 features) rows and tokens take 252 us
with tiles of 128 tokens, 293 us with 256, 348 us with 512, whose tiles at work at one time L2 no longer holds.
"""

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon

from fp8moe.kernels import numerics
from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from
from fp8moe.kernels.sm90.activations import (
    BY_FEATURES,
    BY_TOKENS,
    FEATURE_BLOCKS,
    dequantization_scale,
    encode_e4m3,
    find_block,
    gather_rows,
    long_tile_scaling,
    quantization_factor,
    store_rows,
    store_token_scale,
    write_token_codes,
)
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand

EXPERTS_IN_LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
MIN_EXPERTS = 128  # a thread each
REGISTERS = 168
"""Of a thread that makes rows and tokens of two-byte elements: three programs on a multiprocessor. Left alone, the
compiler takes 230, which is 6% slower. Elements of four bytes would spill, and so would rows of no whole vectors."""


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def find_tile(padded_ends, number, E, TILE: gl.constexpr, EXPERTS: gl.constexpr):
    """Bounds of the group that the `number`-th token tile belongs to, and the tile's first row; all 0 past the last.

    Tiles begin where groups do, so the ends alone tell their rows.
    """
    expert = gl.arange(0, EXPERTS, EXPERTS_IN_LANES)
    end = gl.load(padded_ends + expert, mask=expert < E, other=0)
    start = gl.load(padded_ends + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    tiles = gl.where(expert < E, (end - start + (TILE - 1)) // TILE, 0)
    before = gl.associative_scan(tiles, 0, _add) - tiles
    is_mine = (before <= number) & (number < before + tiles)
    group_start = gl.max(gl.where(is_mine, start, 0), 0)
    group_end = gl.max(gl.where(is_mine, end, 0), 0)
    tile_start = group_start + gl.max(gl.where(is_mine, number - before, 0), 0) * TILE
    # All are multiples of 128 as they are; so the compiler sees it, and stores whole vectors.
    return group_start // 128 * 128, group_end // 128 * 128, tile_start // 128 * 128


@gluon.jit
def quantize_long_tiles_hopper_kernel(
    x,  # (M, NUM_FEATURES) bf16, fp16, fp32, or codes, e4m3; any strides
    x_scale,  # of codes: fp32 (M, feature blocks), blocks contiguous; else None
    row_source, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES in whole blocks); fp32 stored (that / 128, CAPACITY)
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    stride_row, stride_feature, stride_scale, NUM_FEATURES, CAPACITY, E, tiles,
    TILE: gl.constexpr, EXPERTS: gl.constexpr, PER_EXPERT: gl.constexpr, POW2: gl.constexpr,
    MASK_FEATURES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One program quantizes a tile of up to TILE tokens x 128 features, as tokens, and as rows unless `row_data` is
    None. `tiles` is how many there may be, EXPERTS at least E. MASK_FEATURES says that NUM_FEATURES is no multiple of
    128; GROUP is for `find_block`."""
    feature_blocks = gl.cdiv(NUM_FEATURES, 128)
    features_end = NUM_FEATURES if MASK_FEATURES else None
    tile, feature_block = find_block(gl.program_id(0), tiles, feature_blocks, GROUP)
    group_start, group_end, tile_start = find_tile(padded_ends, tile, E, TILE, EXPERTS)
    if group_start == group_end:
        return
    tile_end = min(tile_start + TILE, group_end)
    row = gl.arange(0, 128, gl.SliceLayout(1, BY_FEATURES))
    feature = feature_block * 128 + gl.arange(0, 128, gl.SliceLayout(0, BY_FEATURES))

    amax = gl.zeros([128], gl.float32, gl.SliceLayout(0, BY_FEATURES))
    for row_start in range(tile_start, tile_end, 128):
        source = gl.load(row_source + row_start + row)
        block = gather_rows(
            x, x_scale, source, feature_block, feature, stride_row, stride_feature, stride_scale, "evict_last",
            features_end,
        )  # fmt: skip
        amax = numerics.maximum(amax, gl.reduce(gl.abs(block), 0, numerics.maximum))
        if row_data is not None:
            store_rows(
                block, row_data, row_scale, row_start, feature_block, feature, feature_blocks * 128, CAPACITY, POW2
            )

    scale = dequantization_scale(amax, POW2)
    scale, factor = long_tile_scaling(amax, scale, quantization_factor(amax, scale, POW2))
    factor = gl.convert_layout(factor, gl.SliceLayout(0, BY_TOKENS))
    for row_start in range(tile_start, tile_end, 128):
        source = gl.load(row_source + row_start + row)
        block = gather_rows(
            x, x_scale, source, feature_block, feature, stride_row, stride_feature, stride_scale, "evict_first",
            features_end,
        )  # fmt: skip
        codes = encode_e4m3(gl.convert_layout(block, BY_TOKENS), gl.expand_dims(factor, 0))
        write_token_codes(
            codes, token_data, group_start, group_end, row_start, feature_block * 128, NUM_FEATURES, CAPACITY,
            PER_EXPERT, MASK_FEATURES,
        )  # fmt: skip
        scales = token_scale + gl.to_tensor(row_start // 128).to(gl.int64) * NUM_FEATURES + feature
        store_token_scale(scales, scale, feature, features_end)


def launch_quantize_long_tiles_hopper(
    x: Tensor, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand, *, pow2: bool,
    x_scale: Tensor | None = None, feature_blocks: int = FEATURE_BLOCKS,
) -> None:  # fmt: skip
    """Quantize `x` `(M, D)`, `D` any size, into `tokens`, whose tiles are longer than 128, and into `rows` if given, in
    one pass. `x` may be codes with `x_scale`. Without rows the grid takes `feature_blocks` blocks of features at a
    time, all if that is 0."""
    num_features, capacity, num_experts = x.shape[1], groups.capacity, groups.num_groups
    blocks = capacity // BLOCK
    # Every group may end in a shorter tile.
    tiles = ceil_div(capacity, tokens.token_tile) + min(num_experts, blocks)
    if blocks * num_features == 0:
        return
    launch(
        quantize_long_tiles_hopper_kernel, tiles * ceil_div(num_features, BLOCK),
        x, x_scale,
        groups.row_source, groups.padded_ends,
        rows and rows.data, rows and rows.stored_scale, tokens.data, tokens.stored_scale,
        x.stride(0), x.stride(1), 0 if x_scale is None else x_scale.stride(0), num_features, capacity, num_experts,
        tiles,
        TILE=tokens.token_tile, EXPERTS=max(power_of_2_from(num_experts), MIN_EXPERTS),
        PER_EXPERT=tokens.layout is TokenLayout.PER_EXPERT, POW2=pow2, MASK_FEATURES=num_features % BLOCK != 0,
        GROUP=0 if rows else feature_blocks,
        num_warps=4,
        **({"maxnreg": REGISTERS} if rows and x.element_size() == 2 and num_features % 16 == 0 else {}),
    )  # fmt: skip
