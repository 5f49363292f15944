"""Kernel: SwiGLU's backward to every quantized operand that the gradients of an expert need.

A tile of 128 rows x 128 features of three inputs and three outputs does not fit in the registers of a multiprocessor
beside a second one. So a program goes over its tile twice: along the rows, a quarter of them at a time, for what is
quantized along the features and summed over them; then along the features, a quarter at a time, for what is quantized
along the tokens. The second time it reads from the caches: memory is read once.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.gate import SWIGLU, GatedActivation
from fp8moe.kernels.activations import load_rows, store_rows_of_tile, token_offsets
from fp8moe.kernels.gated import (
    GATES,
    add_biases,
    constants_of,
    contiguous_bias,
    live_features,
    live_of,
    load_biases,
    load_gate_up,
    load_half,
    load_live,
    rows_of_parameter,
    store_live,
    weights_of_rows,
)
from fp8moe.kernels.launch import launch
from fp8moe.kernels.numerics import encode_e4m3, row_amax, rows_of_tile, token_scaling, transpose_tile
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand, data_and_scale

ROWS, FEATURES = 32, 32
"""How much of a tile is in registers at a time, on the two ways over it."""


@triton.jit
def load_transposed(x, row_source, row_start, features, stride_row):
    """fp32 `(features, 128)`: the 128 padded rows from `row_start` on, zeros on padding."""
    parts = ()
    for r in tl.static_range(16):
        source = tl.load(row_source + rows_of_tile(row_start, r))
        parts = parts + (load_rows(x, source, features, stride_row, 1),)
    return transpose_tile(parts, features.shape[0])


@triton.jit
def load_transposed_half(
    x, x_scale, row_source, row_start, features, feature_block, HALF: tl.constexpr, stride_row, NUM_FEATURES, CAPACITY
):  # fmt: skip
    """The same of the gate or of up, see `load_half`."""
    parts = ()
    for r in tl.static_range(16):
        rows = rows_of_tile(row_start, r)
        source = tl.load(row_source + rows)
        half = load_half(x, x_scale, source, rows, features, feature_block, HALF, stride_row, NUM_FEATURES, CAPACITY)
        parts = parts + (half,)
    return transpose_tile(parts, features.shape[0])


@triton.jit
def store_tokens_of_tile(
    tile, tile_amax, token_data, token_scale, padded_ends, expert, row_block, row_start, features, at,
    WIDTH, LIVE, CAPACITY, PER_EXPERT: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """`store_tokens_of_parts` of a tile that is transposed already, `(features, 128)`: its features lie `at` among the
    `WIDTH` of the operand, and those past the live ones nowhere."""
    scale_offsets = row_block.to(tl.int64) * WIDTH + at
    amax = row_amax(tile) if tile_amax is None else load_live(tile_amax, features, scale_offsets, LIVE)
    scale, factor = token_scaling(amax, tile_amax is not None, POW2)
    offsets = token_offsets(padded_ends, expert, row_start, at, WIDTH, CAPACITY, PER_EXPERT)
    codes = encode_e4m3(tile, factor[:, None])
    if LIVE is None:
        tl.store(token_data + offsets, codes)
        tl.store(token_scale + scale_offsets, scale)
    else:
        tl.store(token_data + offsets, codes, mask=(features < LIVE)[:, None])
        tl.store(token_scale + scale_offsets, scale, mask=features < LIVE)


@triton.jit
def store_gradient_by_features(
    tile, token_data, token_scale, bias_sums, padded_ends, expert, row_block, row_start, features,
    HALF: tl.constexpr, NUM_FEATURES, LIVE, CAPACITY,
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr, HAS_GATE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What is made of the gradient of a half, `(features, 128)`, along the rows: tokens, and the sums for the bias."""
    width = live_of(NUM_FEATURES, LIVE) * (2 if HAS_GATE else 1)
    at = rows_of_parameter(features, HALF, NUM_FEATURES, LIVE, INTERLEAVED)
    if token_data is not None:
        store_tokens_of_tile(
            tile, None, token_data, token_scale, padded_ends, expert, row_block, row_start, features, at,
            width, LIVE, CAPACITY, PER_EXPERT, POW2,
        )  # fmt: skip
    if bias_sums is not None:
        store_live(bias_sums + row_block.to(tl.int64) * width, features, at, tl.sum(tile, 1), LIVE)


@triton.jit
def quantize_swiglu_backward_kernel(
    d_act,  # (rows, NUM_FEATURES) bf16, fp16 or fp32, features contiguous
    x,  # (rows, 2 * NUM_FEATURES), the same: gate, then up; without a gate, up alone, and all that is wide is half so
    x_scale,  # None; or x is e4m3 (CAPACITY, 2 * NUM_FEATURES), and this fp32 stored (NUM_FEATURES / 64, CAPACITY)
    row_weights,  # (rows,) any float dtype, or None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # of d_x: e4m3 (CAPACITY, 2 * NUM_FEATURES); fp32 stored (NUM_FEATURES / 64, CAPACITY)
    token_data, token_scale,  # of d_x: e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, 2 * LIVE)
    act_data, act_scale,  # of the activation: e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, LIVE)
    act_amax,  # None, or of the activation's long token tiles fp32 (CAPACITY / 128, LIVE), see LongTiles
    weight_parts,  # None, or fp32 (NUM_FEATURES / 128, NUM_ROWS): the row weights' gradients, in parts
    stride_d_act, stride_x, NUM_FEATURES, LIVE, CAPACITY, NUM_ROWS,  # LIVE: None where all features are live
    bias,  # (E, 2 * LIVE) any float dtype, or None
    bias_sums,  # None, or fp32 (CAPACITY / 128, 2 * LIVE): the bias's gradient, sums of row blocks
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr, PARAMETERS: tl.constexpr, HAS_GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENTS: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One program does 128 padded rows x 128 features of each half; outputs that are None are skipped."""
    feature_blocks = NUM_FEATURES // 128
    row_block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    row_start = row_block * 128
    feature_start = feature_block * 128
    expert = tl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    if expert < 0:
        return

    halves: tl.constexpr = 2 if HAS_GATE else 1
    if row_data is not None or weight_parts is not None:
        all_features = feature_start + tl.arange(0, 128)
        gate_bias = None
        up_bias = None
        if bias is not None:
            gate_bias, up_bias = load_biases(bias, expert, all_features, NUM_FEATURES, LIVE, HAS_GATE, INTERLEAVED)
        for start in range(0, 128, ROWS):
            rows = row_start + start + tl.arange(0, ROWS)
            source = tl.load(row_source + rows)
            gradient = load_rows(d_act, source, all_features, stride_d_act, 1)
            gate, up = load_gate_up(
                x, x_scale, source, rows, all_features, feature_block, stride_x, NUM_FEATURES, CAPACITY, HAS_GATE
            )
            gate, up = add_biases(gate, up, gate_bias, up_bias)
            if weight_parts is not None:
                sums = tl.sum(gradient * ACTIVATION(gate, up, PARAMETERS), 1)
                tl.store(weight_parts + feature_block.to(tl.int64) * NUM_ROWS + source, sums, mask=source >= 0)
            if row_data is not None:
                weighted = gradient * weights_of_rows(row_weights, source, bias)[:, None]
                d_gate, d_up = GRADIENTS(weighted, gate, up, PARAMETERS)
                width = halves * NUM_FEATURES
                store_rows_of_tile(d_gate, row_data, row_scale, rows, feature_start, width, CAPACITY, POW2)
                if HAS_GATE:
                    up_start = NUM_FEATURES + feature_start
                    store_rows_of_tile(d_up, row_data, row_scale, rows, up_start, width, CAPACITY, POW2)

    if token_data is not None or act_data is not None or bias_sums is not None:
        all_sources = tl.load(row_source + row_start + tl.arange(0, 128))
        all_weights = weights_of_rows(row_weights, all_sources, bias)[None, :]
        live = live_of(NUM_FEATURES, LIVE)
        for start in range(0, 128, FEATURES):
            features = feature_start + start + tl.arange(0, FEATURES)
            gate = load_transposed_half(
                x, x_scale, row_source, row_start, features, feature_block, 0, stride_x, NUM_FEATURES, CAPACITY
            )
            if HAS_GATE:
                up = load_transposed_half(
                    x, x_scale, row_source, row_start, features, feature_block, 1, stride_x, NUM_FEATURES, CAPACITY
                )
            else:
                up = gate
            if bias is not None:
                # Other names than above: within a loop a name keeps its shape.
                biases = load_biases(bias, expert, features, NUM_FEATURES, LIVE, HAS_GATE, INTERLEAVED)
                gate = gate + biases[0][:, None]
                up = up + biases[1][:, None]
            if act_data is not None:
                act = ACTIVATION(gate, up, PARAMETERS) * all_weights
                store_tokens_of_tile(
                    act, act_amax, act_data, act_scale, padded_ends, expert, row_block, row_start, features, features,
                    live, LIVE, CAPACITY, PER_EXPERT, POW2,
                )  # fmt: skip
            if token_data is not None or bias_sums is not None:
                gradient = load_transposed(d_act, row_source, row_start, features, stride_d_act)
                d_gate, d_up = GRADIENTS(gradient * all_weights, gate, up, PARAMETERS)
                store_gradient_by_features(
                    d_gate, token_data, token_scale, bias_sums, padded_ends, expert, row_block, row_start, features,
                    0, NUM_FEATURES, LIVE, CAPACITY, PER_EXPERT, POW2, HAS_GATE, INTERLEAVED,
                )  # fmt: skip
                if HAS_GATE:
                    store_gradient_by_features(
                        d_up, token_data, token_scale, bias_sums, padded_ends, expert, row_block, row_start, features,
                        1, NUM_FEATURES, LIVE, CAPACITY, PER_EXPERT, POW2, HAS_GATE, INTERLEAVED,
                    )  # fmt: skip


def launch_quantize_swiglu_backward(
    d_act: Tensor,
    x: Tensor | RowOperand,
    groups: TokenGroups,
    d_x_rows: RowOperand | None,
    d_x_tokens: TokenOperand | None,
    act_tokens: TokenOperand | None,
    weight_parts: Tensor | None,
    bias_sums: Tensor | None = None,
    *,
    row_weights: Tensor | None,
    pow2: bool,
    act: GatedActivation,
    act_amax: Tensor | None = None,
) -> None:
    """From `d_act` `(rows, Ip)` and `x` `(rows, 2Ip)` (`Ip` without a gate), features contiguous, or `x` quantized
    `(R, 2Ip)`, into the operands given, in one pass; of the activation `act`.

    `row_weights` is contiguous. `weight_parts` is fp32 `(Ip/128, rows)`, `bias_sums` fp32 `(R/128, 2I)`; what belongs
    to no group is left as it is. `act_amax` is the `amax` of the `LongTiles` that the activation is quantized in.
    """
    blocks = count_tiles(d_act, groups)
    if blocks == 0:
        return
    layouts = {operand.layout for operand in (d_x_tokens, act_tokens) if operand}
    launch(
        quantize_swiglu_backward_kernel, blocks,
        *kernel_arguments(d_act, x, row_weights, groups, d_x_rows, d_x_tokens, act_tokens, act_amax, weight_parts, act),
        contiguous_bias(act), bias_sums,
        PER_EXPERT=TokenLayout.PER_EXPERT in layouts, POW2=pow2,
        **constants_of(act.gate), INTERLEAVED=act.interleaved, GRADIENTS=GATES[act.gate.kind].gradients,
        FEATURES=FEATURES, num_warps=8,
        # SwiGLU: two programs on a multiprocessor, and nothing spilled. Others would spill.
        **({"ROWS": ROWS, "maxnreg": 128} if act.gate == SWIGLU and act.bias is None else {"ROWS": ROWS // 2}),
    )  # fmt: skip


def count_tiles(d_act: Tensor, groups: TokenGroups) -> int:
    """How many tiles of 128 padded rows x 128 features there are."""
    return (groups.capacity // BLOCK) * (d_act.shape[1] // BLOCK)


def kernel_arguments(
    d_act: Tensor,
    x: Tensor | RowOperand,
    row_weights: Tensor | None,
    groups: TokenGroups,
    d_x_rows: RowOperand | None,
    d_x_tokens: TokenOperand | None,
    act_tokens: TokenOperand | None,
    act_amax: Tensor | None,
    weight_parts: Tensor | None,
    act: GatedActivation,
) -> tuple[Any, ...]:
    """What this kernel and its twin for Hopper take first, in order."""
    values, x_scale = data_and_scale(x)
    return (
        d_act, values, x_scale, row_weights,
        groups.row_source, groups.row_expert, groups.padded_ends,
        *(d_x_rows.tensors if d_x_rows else (None, None)),
        *(d_x_tokens.tensors if d_x_tokens else (None, None)),
        *(act_tokens.tensors if act_tokens else (None, None)),
        act_amax, weight_parts,
        d_act.stride(0), values.stride(0), d_act.shape[1], live_features(act), groups.capacity, d_act.shape[0],
    )  # fmt: skip
