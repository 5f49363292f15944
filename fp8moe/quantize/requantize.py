"""Kernel: a row operand with POW2 scales to the token operand of the same values, without the high-precision tensor.

Scales that are powers of two only shift exponents, so nothing is rounded a second time except what underflows: the
gradient of wgrad can be made from what dgrad (or a dispatch between GPUs) already has in FP8.
"""

import triton
import triton.language as tl

from fp8moe.groups import TokenGroups
from fp8moe.operands import BLOCK, RowOperand, TokenLayout, TokenOperand
from fp8moe.quantize.activations import token_tile_offsets
from fp8moe.quantize.numerics import encode_e4m3, magnitude_bits, tile_scale


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
    expert = tl.load(row_expert + row_start)
    if expert < 0:
        return

    rows = row_start + tl.arange(0, 128)
    features = feature_block * 128 + tl.arange(0, 128)
    live = tl.load(row_source + rows) >= 0
    codes = tl.load(
        row_data + rows[:, None].to(tl.int64) * NUM_FEATURES + features[None, :], mask=live[:, None], other=0.0
    )
    scale = tl.load(row_scale + feature_block.to(tl.int64) * CAPACITY + rows, mask=live, other=0.0)
    tile = codes.to(tl.float32) * scale[:, None]

    new_scale, factor = tile_scale(tl.max(magnitude_bits(tile), axis=0), True)
    offsets = token_tile_offsets(padded_ends, expert, row_start, features, NUM_FEATURES, CAPACITY, PER_EXPERT)
    tl.store(token_data + offsets, tl.trans(encode_e4m3(tile, factor[None, :])))
    tl.store(token_scale + row_block.to(tl.int64) * NUM_FEATURES + features, new_scale)


def launch_requantize_rows_to_tokens(rows: RowOperand, groups: TokenGroups, tokens: TokenOperand) -> None:
    """Re-tile `rows`, which must have POW2 scales, into `tokens`."""
    capacity, num_features = rows.data.shape
    blocks = (capacity // BLOCK) * (num_features // BLOCK)
    if blocks == 0:
        return
    requantize_rows_to_tokens_kernel[(blocks,)](
        rows.data, rows.scale,
        groups.row_source, groups.row_expert, groups.padded_ends,
        tokens.data, tokens.scale, num_features, capacity,
        PER_EXPERT=tokens.layout is TokenLayout.PER_EXPERT,
        num_warps=8,
    )  # fmt: skip
