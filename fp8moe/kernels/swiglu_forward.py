"""Kernels: gate and up to the quantized activation, as a row operand, a token operand, or both from one read."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.activations import load_row_weights, load_rows, store_rows, store_rows_of_tile, store_tokens
from fp8moe.kernels.gated import GATES
from fp8moe.kernels.launch import launch
from fp8moe.kernels.long_tiles import PART
from fp8moe.kernels.numerics import maximum, rows_of_tile
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand

ROWS = PART
"""What a program makes where no tokens are made, 32 rows: 0.96 and 0.93 of the copy rate on an H200, with sixteen parts
0.73 and 0.71 (rows 32768, I 2048; rows 65536, I 768)."""


@triton.jit
def quantize_swiglu_to_rows_kernel(
    x,  # (rows, 2 * NUM_FEATURES) bf16, fp16 or fp32, features contiguous: gate, then up
    row_weights,  # (rows,) any float dtype, or None
    row_source, row_expert,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES); fp32 stored (NUM_FEATURES / 128, CAPACITY)
    part_amax,  # None, or fp32 (CAPACITY / ROWS, NUM_FEATURES): the largest magnitudes in a program's rows
    stride_row, NUM_FEATURES, CAPACITY,
    POW2: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program makes and quantizes ROWS padded rows x 128 features. Nothing is transposed, so the tile need not be
    in sixteen parts: 16 threads share a row and read it in whole vectors."""
    feature_blocks = NUM_FEATURES // 128
    row_start = tl.program_id(0) // feature_blocks * ROWS
    feature_start = tl.program_id(0) % feature_blocks * 128
    features = feature_start + tl.arange(0, 128)
    rows = row_start + tl.arange(0, ROWS)
    expert = tl.load(row_expert + row_start // 128 * 128)  # groups are padded to 128 rows: a live block's first is live
    source = tl.load(row_source + rows)  # before the branch, so that it is under way while it waits
    if expert < 0:
        return
    gate = load_rows(x, source, features, stride_row, 1)
    up = load_rows(x + NUM_FEATURES, source, features, stride_row, 1)
    weight = load_row_weights(row_weights, source)
    act = ACTIVATION(gate, up) * weight[:, None]
    store_rows_of_tile(act, row_data, row_scale, rows, feature_start, NUM_FEATURES, CAPACITY, POW2)
    if part_amax is not None:  # last, which takes fewer registers
        part = (row_start // ROWS).to(tl.int64)
        tl.store(part_amax + part * NUM_FEATURES + features, tl.reduce(tl.abs(act), 0, maximum))


@triton.jit
def quantize_swiglu_kernel(
    x,  # (rows, 2 * NUM_FEATURES) bf16, fp16 or fp32, features contiguous: gate, then up
    row_weights,  # (rows,) any float dtype, or None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES); fp32 stored (NUM_FEATURES / 128, CAPACITY)
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    tile_amax,  # None, or of long token tiles fp32 (CAPACITY / 128, NUM_FEATURES), see LongTiles
    stride_row, NUM_FEATURES, CAPACITY,
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program makes and quantizes 128 padded rows x 128 features: as tokens, and as rows unless that is None."""
    feature_blocks = NUM_FEATURES // 128
    row_block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    row_start = row_block * 128
    features = feature_block * 128 + tl.arange(0, 128)
    expert = tl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    sources = ()
    for r in tl.static_range(16):  # before the branch, so that they are under way while it waits
        sources = sources + (tl.load(row_source + rows_of_tile(row_start, r)),)
    if expert < 0:
        return

    parts = ()
    for r in tl.static_range(16):
        gate = load_rows(x, sources[r], features, stride_row, 1)
        up = load_rows(x + NUM_FEATURES, sources[r], features, stride_row, 1)
        weight = load_row_weights(row_weights, sources[r])
        parts = parts + (ACTIVATION(gate, up) * weight[:, None],)
    if row_data is not None:
        store_rows(parts, row_data, row_scale, row_start, feature_block, features, NUM_FEATURES, CAPACITY, POW2)
    store_tokens(
        parts, tile_amax, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
        NUM_FEATURES, CAPACITY, PER_EXPERT, POW2,
    )  # fmt: skip


def launch_quantize_swiglu(
    x: Tensor,
    groups: TokenGroups,
    rows: RowOperand | None,
    tokens: TokenOperand | None,
    *,
    row_weights: Tensor | None,
    pow2: bool,
    gate: str,
    part_amax: Tensor | None = None,
    tile_amax: Tensor | None = None,
) -> None:
    """The activation of `x` `(rows, 2I)`, features contiguous, into the operands given, in one pass.

    `row_weights` is contiguous, `gate` one of `GATES`. Where rows alone are made, `part_amax`, fp32 `(R/32, I)`, gets
    the largest magnitudes in each 32 rows. `tile_amax` is the `amax` of the `LongTiles` that the tokens are quantized
    in.
    """
    num_features, capacity = x.shape[1] // 2, groups.capacity
    blocks = (capacity // BLOCK) * (num_features // BLOCK)
    if blocks == 0:
        return
    if tokens is not None:
        launch(
            quantize_swiglu_kernel, blocks,
            x, row_weights,
            groups.row_source, groups.row_expert, groups.padded_ends,
            rows and rows.data, rows and rows.stored_scale, tokens.data, tokens.stored_scale, tile_amax,
            x.stride(0), num_features, capacity,
            PER_EXPERT=tokens.layout is TokenLayout.PER_EXPERT, POW2=pow2, ACTIVATION=GATES[gate].activation,
            num_warps=8,  # with 4, two halves of the input and one of the output do not fit in the registers
        )  # fmt: skip
    elif rows is not None:
        launch(
            quantize_swiglu_to_rows_kernel, blocks * (BLOCK // ROWS),
            x, row_weights,
            groups.row_source, groups.row_expert, rows.data, rows.stored_scale, part_amax,
            x.stride(0), num_features, capacity,
            POW2=pow2, ACTIVATION=GATES[gate].activation, ROWS=ROWS,
            num_warps=4,
        )  # fmt: skip
