"""Kernel: SwiGLU's backward to every quantized operand that the gradients of an expert need.

A tile of 128 rows x 128 features of three inputs and three outputs does not fit in the registers of a multiprocessor
beside a second one. So a program goes over its tile twice: along the rows, a quarter of them at a time, for what is
quantized along the features and summed over them; then along the features, a quarter at a time, for what is quantized
along the tokens. The second time it reads from the caches: memory is read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.activations import load_rows, store_row_codes, token_offsets
from fp8moe.kernels.gated import load_weights, sigmoid, swiglu, swiglu_backward
from fp8moe.kernels.launch import launch
from fp8moe.kernels.numerics import (
    dequantization_scale,
    encode_e4m3,
    long_tile_scaling,
    quantization_factor,
    row_amax,
    rows_of_tile,
    transpose_tile,
)
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand
from fp8moe.quantize.swiglu_reference import GateUpLayout

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
def store_token_codes(
    tile, tile_amax, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
    NUM_FEATURES, CAPACITY, PER_EXPERT: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Quantize `(features, 128)` along the 128 tokens, into a token operand: as a tile, or, where `tile_amax` is given,
    as part of a long one."""
    if tile_amax is None:
        amax = row_amax(tile)
    else:
        amax = tl.load(tile_amax + row_block.to(tl.int64) * NUM_FEATURES + features)
    scale = dequantization_scale(amax, POW2)
    offsets = token_offsets(padded_ends, expert, row_start, features, NUM_FEATURES, CAPACITY, PER_EXPERT)
    factor = quantization_factor(amax, scale, POW2)
    if tile_amax is not None:
        scale, factor = long_tile_scaling(amax, scale, factor)
    tl.store(token_data + offsets, encode_e4m3(tile, factor[:, None]))
    tl.store(token_scale + row_block.to(tl.int64) * NUM_FEATURES + features, scale)


@triton.jit
def quantize_swiglu_backward_kernel(
    d_act,  # (rows, NUM_FEATURES) bf16, fp16 or fp32, features contiguous
    x,  # (rows, 2 * NUM_FEATURES), the same
    row_weights,  # (rows,) any float dtype, or None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # of d_x: e4m3 (CAPACITY, 2 * NUM_FEATURES); fp32 stored (NUM_FEATURES / 64, CAPACITY)
    token_data, token_scale,  # of d_x: e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, 2 * NUM_FEATURES)
    act_data, act_scale,  # of the activation: e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    act_amax,  # None, or of the activation's long token tiles fp32 (CAPACITY / 128, NUM_FEATURES), see LongTiles
    weight_sums,  # fp32 (NUM_FEATURES / 128, NUM_ROWS): the row weights' gradients, a sum for each feature block
    stride_d_act, stride_x, gate_start, up_start, NUM_FEATURES, CAPACITY, NUM_ROWS,
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr, ROUND_THROUGH_BF16: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One program does 128 padded rows x 128 features of each half: what is None is not made."""
    feature_blocks = NUM_FEATURES // 128
    row_block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    row_start = row_block * 128
    feature_start = feature_block * 128
    expert = tl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    if expert < 0:
        return

    if row_data is not None or weight_sums is not None:
        all_features = feature_start + tl.arange(0, 128)
        for start in range(0, 128, ROWS):
            rows = row_start + start + tl.arange(0, ROWS)
            source = tl.load(row_source + rows)
            gradient = load_rows(d_act, source, all_features, stride_d_act, 1)
            gate = load_rows(x, source, gate_start + all_features, stride_x, 1)
            up = load_rows(x, source, up_start + all_features, stride_x, 1)
            if weight_sums is not None:
                sums = tl.sum(gradient * (gate * sigmoid(gate) * up), 1)
                tl.store(weight_sums + feature_block.to(tl.int64) * NUM_ROWS + source, sums, mask=source >= 0)
            if row_data is not None:
                weight = load_weights(row_weights, source)[:, None]
                d_gate, d_up = swiglu_backward(gradient, gate, up, weight)
                width = 2 * NUM_FEATURES
                store_row_codes(d_gate, row_data, row_scale, rows, gate_start + feature_start, width, CAPACITY, POW2)
                store_row_codes(d_up, row_data, row_scale, rows, up_start + feature_start, width, CAPACITY, POW2)

    if token_data is not None or act_data is not None:
        all_weights = load_weights(row_weights, tl.load(row_source + row_start + tl.arange(0, 128)))[None, :]
        for start in range(0, 128, FEATURES):
            features = feature_start + start + tl.arange(0, FEATURES)
            gate = load_transposed(x, row_source, row_start, gate_start + features, stride_x)
            up = load_transposed(x, row_source, row_start, up_start + features, stride_x)
            if act_data is not None:
                act = swiglu(gate, up, all_weights, ROUND_THROUGH_BF16)
                store_token_codes(
                    act, act_amax, act_data, act_scale, padded_ends, expert, row_block, row_start, features,
                    NUM_FEATURES, CAPACITY, PER_EXPERT, POW2,
                )  # fmt: skip
            if token_data is not None:
                gradient = load_transposed(d_act, row_source, row_start, features, stride_d_act)
                d_gate, d_up = swiglu_backward(gradient, gate, up, all_weights)
                store_token_codes(
                    d_gate, None, token_data, token_scale, padded_ends, expert, row_block, row_start,
                    gate_start + features, 2 * NUM_FEATURES, CAPACITY, PER_EXPERT, POW2,
                )  # fmt: skip
                store_token_codes(
                    d_up, None, token_data, token_scale, padded_ends, expert, row_block, row_start,
                    up_start + features, 2 * NUM_FEATURES, CAPACITY, PER_EXPERT, POW2,
                )  # fmt: skip


def launch_quantize_swiglu_backward(
    d_act: Tensor,
    x: Tensor,
    groups: TokenGroups,
    d_x_rows: RowOperand | None,
    d_x_tokens: TokenOperand | None,
    act_tokens: TokenOperand | None,
    weight_sums: Tensor | None,
    *,
    halves: GateUpLayout,
    row_weights: Tensor | None,
    pow2: bool,
    round_through_bf16: bool,
    act_amax: Tensor | None = None,
) -> None:
    """From `d_act` `(rows, I)` and `x` `(rows, 2I)`, features contiguous, into the operands given, in one pass.

    `row_weights` is contiguous. `weight_sums` is fp32 `(I/128, rows)`; rows of no group are left as they are.
    `act_amax` is the `amax` of the `LongTiles` that the activation is quantized in.
    """
    num_features, capacity = d_act.shape[1], groups.capacity
    blocks = (capacity // BLOCK) * (num_features // BLOCK)
    if blocks == 0:
        return
    layouts = {operand.layout for operand in (d_x_tokens, act_tokens) if operand}
    launch(
        quantize_swiglu_backward_kernel, blocks,
        d_act, x, row_weights,
        groups.row_source, groups.row_expert, groups.padded_ends,
        d_x_rows and d_x_rows.data, d_x_rows and d_x_rows.stored_scale,
        d_x_tokens and d_x_tokens.data, d_x_tokens and d_x_tokens.stored_scale,
        act_tokens and act_tokens.data, act_tokens and act_tokens.stored_scale, act_amax,
        weight_sums,
        d_act.stride(0), x.stride(0), *halves.starts(num_features), num_features, capacity, d_act.shape[0],
        PER_EXPERT=TokenLayout.PER_EXPERT in layouts, POW2=pow2, ROUND_THROUGH_BF16=round_through_bf16,
        ROWS=ROWS, FEATURES=FEATURES,
        num_warps=8, maxnreg=128,  # two programs on a multiprocessor, and nothing spilled
    )  # fmt: skip
