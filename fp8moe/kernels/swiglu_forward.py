"""Kernels: gate and up to the quantized activation, as a row operand, a token operand, or both from one read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.gate import SWIGLU, GatedActivation
from fp8moe.kernels.activations import store_rows, store_rows_of_tile, token_offsets
from fp8moe.kernels.gated import (
    add_biases,
    constants_of,
    contiguous_bias,
    live_features,
    live_of,
    load_biases,
    load_gate_up,
    weights_of_rows,
)
from fp8moe.kernels.launch import launch
from fp8moe.kernels.numerics import column_amax, encode_columns, maximum, rows_of_tile, token_scaling
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenLayout, TokenOperand, data_and_scale

ROWS = 32
"""What a program makes at a time where no tokens are made: 0.96 and 0.93 of the copy rate on an H200, with sixteen
parts 0.73 and 0.71 (rows 32768, I 2048; rows 65536, I 768)."""
ROWS_STORING_X = 16
"""The same where `x` is stored too: with 32 rows it would take 96 registers a thread, and 128 while it measures."""
MEASURING_REGISTERS = 72
"""Of a thread that measures SwiGLU of elements of two bytes: seven programs on a multiprocessor, which begin all loads
of a step at once. Left alone, the compiler takes 96, and some loads wait for others. Anything else might spill."""


@triton.jit
def make_rows(
    x, x_scale, row_weights, bias, gate_bias, up_bias, row_data, row_scale, x_row_data, x_row_scale, rows, source,
    feature_block, stride_row, NUM_FEATURES, CAPACITY,
    POW2: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETERS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """The activation of some padded rows and 128 features, fp32, which it also quantizes and stores. Nothing is
    transposed, so the tile need not be in sixteen parts: 16 threads share a row and read it in whole vectors."""
    feature_start = feature_block * 128
    features = feature_start + tl.arange(0, 128)
    gate, up = load_gate_up(
        x, x_scale, source, rows, features, feature_block, stride_row, NUM_FEATURES, CAPACITY, HAS_GATE
    )
    if x_row_data is not None:
        width = (2 if HAS_GATE else 1) * NUM_FEATURES
        store_rows_of_tile(gate, x_row_data, x_row_scale, rows, feature_start, width, CAPACITY, False)
        if HAS_GATE:
            store_rows_of_tile(up, x_row_data, x_row_scale, rows, NUM_FEATURES + feature_start, width, CAPACITY, False)
    gate, up = add_biases(gate, up, gate_bias, up_bias)
    act = ACTIVATION(gate, up, PARAMETERS) * weights_of_rows(row_weights, source, bias)[:, None]
    store_rows_of_tile(act, row_data, row_scale, rows, feature_start, NUM_FEATURES, CAPACITY, POW2)
    return act


@triton.jit
def raise_tile_amax(
    tile_amax, amax, padded_ends, expert, row_start, features, NUM_FEATURES, LIVE, TOKEN_TILE: tl.constexpr
):  # fmt: skip
    """Raise what is known of the largest magnitudes in a token tile, once for each of its blocks, to `amax`, that of
    the 128 padded rows from `row_start` on. A maximum depends on no order. Of numbers that are not negative it is the
    largest as integers too, where NaN is above all."""
    group_start = tl.load(padded_ends + expert - 1, mask=expert > 0, other=0)
    group_end = tl.load(padded_ends + expert)
    tile_start = group_start + (row_start - group_start) // TOKEN_TILE * TOKEN_TILE
    bits = amax.to(tl.int32, bitcast=True)
    live = live_of(NUM_FEATURES, LIVE)
    for block_start in tl.static_range(0, TOKEN_TILE, 128):
        inside = (tile_start + block_start < group_end) & (features < live)
        first = tile_amax + ((tile_start + block_start) // 128).to(tl.int64) * live
        tl.atomic_max(first + features, bits, mask=inside, sem="relaxed")


@triton.jit
def quantize_swiglu_to_rows_kernel(
    x,  # (rows, 2 * NUM_FEATURES) bf16, fp16 or fp32, features contiguous: gate, then up; without a gate, up alone
    x_scale,  # None; or x is e4m3 (CAPACITY, 2 * NUM_FEATURES), and this fp32 stored (NUM_FEATURES / 64, CAPACITY)
    row_weights,  # (rows,) any float dtype, or None
    bias,  # (E, 2 * LIVE) any float dtype, or None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES); fp32 stored (NUM_FEATURES / 128, CAPACITY)
    x_row_data, x_row_scale,  # None, or of x itself, without the bias; twice as wide, scales of any value
    tile_amax,  # None, or zeros int32 (CAPACITY / 128, LIVE), which become the bits of the amax of LongTiles
    stride_row, NUM_FEATURES, LIVE, CAPACITY,  # LIVE: None where all features are live
    POW2: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETERS: tl.constexpr, HAS_GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, TOKEN_TILE: tl.constexpr,
):  # fmt: skip
    """One program makes and quantizes ROWS padded rows x 128 features; where it measures token tiles, 128 rows, ROWS at
    a time."""
    program_rows: tl.constexpr = ROWS if tile_amax is None else 128
    feature_blocks = NUM_FEATURES // 128
    row_start = tl.program_id(0) // feature_blocks * program_rows
    feature_block = tl.program_id(0) % feature_blocks
    features = feature_block * 128 + tl.arange(0, 128)
    rows = row_start + tl.arange(0, ROWS)
    expert = tl.load(row_expert + row_start // 128 * 128)  # groups are padded to 128 rows: a live block's first is live
    source = tl.load(row_source + rows)  # before the branch, so that it is under way while it waits
    if expert < 0:
        return
    gate_bias = None
    up_bias = None
    if bias is not None:
        gate_bias, up_bias = load_biases(bias, expert, features, NUM_FEATURES, LIVE, HAS_GATE, INTERLEAVED)
    if tile_amax is None:
        make_rows(
            x, x_scale, row_weights, bias, gate_bias, up_bias, row_data, row_scale, x_row_data, x_row_scale, rows,
            source, feature_block, stride_row, NUM_FEATURES, CAPACITY, POW2, ACTIVATION, PARAMETERS, HAS_GATE,
        )  # fmt: skip
    else:
        # A thread has every sixteenth row, and keeps the maxima of those it has seen. Threads meet once, at the end.
        largest = tl.zeros((16, 128), tl.float32)
        for start in range(0, 128, ROWS):
            act = make_rows(
                x, x_scale, row_weights, bias, gate_bias, up_bias, row_data, row_scale, x_row_data, x_row_scale,
                rows + start, tl.load(row_source + rows + start), feature_block, stride_row, NUM_FEATURES, CAPACITY,
                POW2, ACTIVATION, PARAMETERS, HAS_GATE,
            )  # fmt: skip
            of_thread = tl.abs(act).reshape(ROWS // 16, 16, 128)
            largest = maximum(largest, tl.reduce(of_thread, 0, maximum))
        raise_tile_amax(
            tile_amax, tl.reduce(largest, 0, maximum), padded_ends, expert, row_start, features, NUM_FEATURES, LIVE,
            TOKEN_TILE,
        )  # fmt: skip


@triton.jit
def store_tokens_of_parts(
    parts, tile_amax, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
    NUM_FEATURES, LIVE, CAPACITY, PER_EXPERT: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Quantize 128 padded rows along these rows, feature by feature, into a token operand: as a tile, or, where the
    maxima `tile_amax` are given, as part of a long one. Of features past the live ones nothing is stored."""
    live = live_of(NUM_FEATURES, LIVE)
    scale_offsets = row_block.to(tl.int64) * live + features
    if tile_amax is None:
        amax = column_amax(parts)
    elif LIVE is None:
        amax = tl.load(tile_amax + scale_offsets)
    else:
        amax = tl.load(tile_amax + scale_offsets, mask=features < LIVE, other=0.0)
    scale, factor = token_scaling(amax, tile_amax is not None, POW2)
    offsets = token_offsets(padded_ends, expert, row_start, features, live, CAPACITY, PER_EXPERT)
    codes = encode_columns(parts, factor, 128)
    if LIVE is None:
        tl.store(token_data + offsets, codes)
        tl.store(token_scale + scale_offsets, scale)
    else:
        tl.store(token_data + offsets, codes, mask=(features < LIVE)[:, None])
        tl.store(token_scale + scale_offsets, scale, mask=features < LIVE)


@triton.jit
def quantize_swiglu_kernel(
    x,  # (rows, 2 * NUM_FEATURES) bf16, fp16 or fp32, features contiguous: gate, then up; without a gate, up alone
    x_scale,  # None; or x is e4m3 (CAPACITY, 2 * NUM_FEATURES), and this fp32 stored (NUM_FEATURES / 64, CAPACITY)
    row_weights,  # (rows,) any float dtype, or None
    bias,  # (E, 2 * LIVE) any float dtype, or None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES); fp32 stored (NUM_FEATURES / 128, CAPACITY)
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, LIVE)
    tile_amax,  # None, or of long token tiles fp32 (CAPACITY / 128, LIVE), see LongTiles
    stride_row, NUM_FEATURES, LIVE, CAPACITY,  # LIVE: None where all features are live
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETERS: tl.constexpr,
    HAS_GATE: tl.constexpr, INTERLEAVED: tl.constexpr,
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

    gate_bias = None
    up_bias = None
    if bias is not None:
        gate_bias, up_bias = load_biases(bias, expert, features, NUM_FEATURES, LIVE, HAS_GATE, INTERLEAVED)
    parts = ()
    for r in tl.static_range(16):
        gate, up = load_gate_up(
            x, x_scale, sources[r], rows_of_tile(row_start, r), features, feature_block,
            stride_row, NUM_FEATURES, CAPACITY, HAS_GATE,
        )  # fmt: skip
        gate, up = add_biases(gate, up, gate_bias, up_bias)
        weight = weights_of_rows(row_weights, sources[r], bias)
        parts = parts + (ACTIVATION(gate, up, PARAMETERS) * weight[:, None],)
    if row_data is not None:
        store_rows(parts, row_data, row_scale, row_start, feature_block, features, NUM_FEATURES, CAPACITY, POW2)
    store_tokens_of_parts(
        parts, tile_amax, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
        NUM_FEATURES, LIVE, CAPACITY, PER_EXPERT, POW2,
    )  # fmt: skip


def launch_quantize_swiglu(
    x: Tensor | RowOperand,
    groups: TokenGroups,
    rows: RowOperand | None,
    tokens: TokenOperand | None,
    *,
    row_weights: Tensor | None,
    pow2: bool,
    act: GatedActivation,
    x_rows: RowOperand | None = None,
    measured: LongTiles | None = None,
    tile_amax: Tensor | None = None,
) -> None:
    """The activation `act` of `x` `(rows, 2Ip)` (`Ip` without a gate), features contiguous, or quantized `(R, 2Ip)`,
    into the operands given, in one pass.

    `row_weights` is contiguous. Where rows alone are made, `x_rows` gets `x` itself, quantized `(R, 2Ip)`, and the
    zeros in `measured` become its maxima. `tile_amax` is the `amax` of the `LongTiles` that the tokens are quantized
    in.
    """
    num_features, capacity = act.padded_features, groups.capacity
    blocks = (capacity // BLOCK) * (num_features // BLOCK)
    if blocks == 0:
        return
    constants = {**constants_of(act.gate), "INTERLEAVED": act.interleaved, "POW2": pow2}
    bias, (values, x_scale) = contiguous_bias(act), data_and_scale(x)
    if tokens is not None:
        launch(
            quantize_swiglu_kernel, blocks,
            values, x_scale, row_weights, bias,
            groups.row_source, groups.row_expert, groups.padded_ends,
            rows and rows.data, rows and rows.stored_scale, tokens.data, tokens.stored_scale, tile_amax,
            values.stride(0), num_features, live_features(act), capacity,
            PER_EXPERT=tokens.layout is TokenLayout.PER_EXPERT, **constants,
            num_warps=8,  # with 4, two halves of the input and one of the output do not fit in the registers
        )  # fmt: skip
    elif rows is not None:
        at_a_time = ROWS_STORING_X if x_rows else ROWS
        is_plain = act.gate == SWIGLU and act.bias is None and values.element_size() == 2
        launch(
            quantize_swiglu_to_rows_kernel, blocks if measured else blocks * (BLOCK // at_a_time),
            values, x_scale, row_weights, bias,
            groups.row_source, groups.row_expert, groups.padded_ends, rows.data, rows.stored_scale,
            x_rows and x_rows.data, x_rows and x_rows.stored_scale, measured and measured.amax.view(torch.int32),
            values.stride(0), num_features, live_features(act), capacity,
            ROWS=at_a_time, TOKEN_TILE=measured.token_tile if measured else None, **constants,
            num_warps=4, **({"maxnreg": MEASURING_REGISTERS} if measured and is_plain and not x_rows else {}),
        )  # fmt: skip
