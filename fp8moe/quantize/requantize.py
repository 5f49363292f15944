"""Kernel: a row operand with POW2 scales to the token operand of the same values, without the high-precision tensor.

Scales that are powers of two only shift exponents, so nothing is rounded a second time except what underflows: the
gradient of wgrad can be made from what dgrad (or a dispatch between GPUs) already has in FP8.
"""

import triton
import triton.language as tl

from fp8moe.groups import TokenGroups
from fp8moe.launch import launch
from fp8moe.operands import BLOCK, RowOperand, TokenLayout, TokenOperand
from fp8moe.quantize.activations import store_tokens
from fp8moe.quantize.numerics import rows_of_tile


@triton.jit
def load_decoded_rows(row_data, row_scale, row_source, rows, features, NUM_FEATURES):
    """fp32 `(rows, features)` of a row operand; zeros on padding. `row_scale` points at this feature block's scales."""
    live = tl.load(row_source + rows) >= 0
    offsets = rows[:, None].to(tl.int64) * NUM_FEATURES + features[None, :]
    codes = tl.load(row_data + offsets, mask=live[:, None], other=0.0)
    return codes.to(tl.float32) * tl.load(row_scale + rows, mask=live, other=0.0)[:, None]


@triton.jit
def requantize_rows_to_tokens_kernel(
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES); fp32 stored (NUM_FEATURES / 128, CAPACITY)
    row_source, row_expert, padded_ends,  # TokenGroups
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    NUM_FEATURES, CAPACITY,
    PER_EXPERT: tl.constexpr,
):  # fmt: skip
    """One program re-tiles 128 padded rows x 128 features."""
    feature_blocks = NUM_FEATURES // 128
    row_block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    row_start = row_block * 128
    features = feature_block * 128 + tl.arange(0, 128)
    expert = tl.load(row_expert + row_start)
    if expert < 0:
        return

    block_scale = row_scale + feature_block.to(tl.int64) * CAPACITY
    parts = ()
    for r in tl.static_range(16):
        rows = rows_of_tile(row_start, r)
        parts = parts + (load_decoded_rows(row_data, block_scale, row_source, rows, features, NUM_FEATURES),)
    store_tokens(
        parts, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
        NUM_FEATURES, CAPACITY, PER_EXPERT, True,
    )  # fmt: skip


def launch_requantize_rows_to_tokens(rows: RowOperand, groups: TokenGroups, tokens: TokenOperand) -> None:
    """Re-tile `rows`, which must have POW2 scales, into `tokens`."""
    capacity, num_features = rows.data.shape
    blocks = (capacity // BLOCK) * (num_features // BLOCK)
    if blocks == 0:
        return
    launch(
        requantize_rows_to_tokens_kernel, blocks,
        rows.data, rows.stored_scale,
        groups.row_source, groups.row_expert, groups.padded_ends,
        tokens.data, tokens.stored_scale, num_features, capacity,
        PER_EXPERT=tokens.layout is TokenLayout.PER_EXPERT,
        num_warps=4,
    )  # fmt: skip
