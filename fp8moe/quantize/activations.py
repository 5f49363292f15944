"""Kernel: ragged activations or gradients to a row operand, a token operand, or both from one read.

The gather into padded groups happens in the load, the transpose of the token operand in registers and shared memory:
each element is read once, each code is written once, and the scales are stored where the GEMMs want them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.groups import TokenGroups
from fp8moe.operands import BLOCK, RowOperand, TokenLayout, TokenOperand
from fp8moe.quantize.numerics import column_amax_bits, encode_e4m3, encode_words, magnitude_bits, tile_scale


@triton.jit
def token_word_offsets(padded_ends, expert, row_start, features, NUM_FEATURES, CAPACITY, PER_EXPERT: tl.constexpr):
    """int64 `(features, 32)` offsets, in 32-bit words of four tokens, of the 128 tokens from padded row `row_start`."""
    if PER_EXPERT:
        # The compiler cannot see that loaded ends are aligned; told so, it stores whole vectors.
        group_start = tl.multiple_of(tl.load(padded_ends + expert - 1, mask=expert > 0, other=0), 128)
        group_rows = tl.multiple_of(tl.load(padded_ends + expert), 128) - group_start
        base = group_start.to(tl.int64) * NUM_FEATURES + (row_start - group_start)
        feature_offsets = features.to(tl.int64) * group_rows
    else:
        base = row_start.to(tl.int64)
        feature_offsets = features.to(tl.int64) * CAPACITY
    return (base + feature_offsets)[:, None] // 4 + tl.arange(0, 32)[None, :]


@triton.jit
def load_rows(x, row_source, rows, features, stride_row, stride_feature):
    """fp32 `(rows, features)` of `x`, gathered through the plan; zeros on padding."""
    source = tl.load(row_source + rows)
    offsets = source[:, None].to(tl.int64) * stride_row + features[None, :].to(tl.int64) * stride_feature
    return tl.load(x + offsets, mask=(source >= 0)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(tile, row_data, row_scale, rows, features, NUM_FEATURES, POW2: tl.constexpr):
    """Quantize `(rows, 128)` along its features; `row_scale` points at the scales of this feature block."""
    scale, factor = tile_scale(tl.max(magnitude_bits(tile), axis=1), POW2)
    codes = encode_e4m3(tile, factor[:, None])
    tl.store(row_data + rows[:, None].to(tl.int64) * NUM_FEATURES + features[None, :], codes)
    tl.store(row_scale + rows, scale)


@triton.jit
def quantize_activation_kernel(
    x,  # (M, NUM_FEATURES) bf16, fp16 or fp32, any strides
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES); fp32 stored (NUM_FEATURES / 128, CAPACITY)
    token_words, token_scale,  # e4m3 as int32, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    stride_row, stride_feature, NUM_FEATURES, CAPACITY,
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """One program quantizes 128 padded rows x 128 features, as rows, tokens or both: what is None is not made."""
    # One grid axis: the others are limited to 65535 blocks. Neighbours share rows, so their reads share DRAM pages.
    feature_blocks = NUM_FEATURES // 128
    row_block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    row_start = row_block * 128
    expert = tl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    if expert < 0:
        return

    rows = row_start + 4 * tl.arange(0, 32)  # of the first quarter, see encode_words
    features = feature_block * 128 + tl.arange(0, 128)
    tile_0 = load_rows(x, row_source, rows, features, stride_row, stride_feature)
    tile_1 = load_rows(x, row_source, rows + 1, features, stride_row, stride_feature)
    tile_2 = load_rows(x, row_source, rows + 2, features, stride_row, stride_feature)
    tile_3 = load_rows(x, row_source, rows + 3, features, stride_row, stride_feature)

    if row_data is not None:
        block_scale = row_scale + feature_block.to(tl.int64) * CAPACITY
        store_rows(tile_0, row_data, block_scale, rows, features, NUM_FEATURES, POW2)
        store_rows(tile_1, row_data, block_scale, rows + 1, features, NUM_FEATURES, POW2)
        store_rows(tile_2, row_data, block_scale, rows + 2, features, NUM_FEATURES, POW2)
        store_rows(tile_3, row_data, block_scale, rows + 3, features, NUM_FEATURES, POW2)
    if token_words is not None:
        scale, factor = tile_scale(column_amax_bits(tile_0, tile_1, tile_2, tile_3), POW2)
        words = encode_words(tile_0, tile_1, tile_2, tile_3, factor[None, :, None])
        offsets = token_word_offsets(padded_ends, expert, row_start, features, NUM_FEATURES, CAPACITY, PER_EXPERT)
        tl.store(token_words + offsets, tl.trans(words))
        tl.store(token_scale + row_block.to(tl.int64) * NUM_FEATURES + features, scale)


def launch_quantize_activation(
    x: Tensor, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand | None, *, pow2: bool
) -> None:
    """Quantize `x` `(M, D)` into the operands given, in one pass."""
    num_features, capacity = x.shape[1], groups.capacity
    blocks = (capacity // BLOCK) * (num_features // BLOCK)
    if blocks == 0:
        return
    quantize_activation_kernel[(blocks,)](
        x,
        groups.row_source, groups.row_expert, groups.padded_ends,
        rows and rows.data, rows and rows.scale, tokens and tokens.data.view(torch.int32), tokens and tokens.scale,
        x.stride(0), x.stride(1), num_features, capacity,
        PER_EXPERT=tokens is not None and tokens.layout is TokenLayout.PER_EXPERT, POW2=pow2,
        num_warps=8 if rows else 4,  # tokens alone on an H200: 0.75 of the copy rate with 4 warps, 0.60 with 8
    )  # fmt: skip
