"""Kernel: ragged activations or gradients to a row operand, a token operand, or both from one read.

The gather into padded groups happens in the load, the transpose of the token operand in registers and shared memory:
each element is read once, each code is written once, and the scales are stored where the GEMMs want them.
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.kernels.numerics import (
    column_amax,
    dequantization_scale,
    encode_columns,
    encode_e4m3,
    join_sixteen,
    quantization_factor,
    row_amax,
    rows_of_tile,
    token_scaling,
)
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand


@triton.jit
def token_offsets(padded_ends, expert, row_start, features, NUM_FEATURES, CAPACITY, PER_EXPERT: tl.constexpr):
    """int64 `(features, 128)`: where the 128 tokens from padded row `row_start` lie in a token operand."""
    if PER_EXPERT:
        # The compiler cannot see that loaded ends are aligned; told so, it stores whole vectors.
        group_start = tl.multiple_of(tl.load(padded_ends + expert - 1, mask=expert > 0, other=0), 128)
        group_rows = tl.multiple_of(tl.load(padded_ends + expert), 128) - group_start
        base = group_start.to(tl.int64) * NUM_FEATURES + (row_start - group_start)
        feature_offsets = features.to(tl.int64) * group_rows
    else:
        base = row_start.to(tl.int64)
        feature_offsets = features.to(tl.int64) * CAPACITY
    return (base + feature_offsets)[:, None] + tl.arange(0, 128)[None, :]


@triton.jit
def load_rows(
    x, source, features, stride_row, stride_feature, features_end=None, x_scale=None, stride_scale=0, feature_block=0
):  # fmt: skip
    """fp32 `(rows, features)`: the rows `source` of `x`, zeros where that is -1, and from `features_end` on. Where `x`
    is codes, `x_scale` has their scales: one a row of `feature_block`."""
    offsets = source[:, None].to(tl.int64) * stride_row + features[None, :].to(tl.int64) * stride_feature
    inside = (source >= 0)[:, None]
    if features_end is not None:
        inside = inside & (features < features_end)[None, :]
    rows = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if x_scale is not None:
        place = x_scale + source.to(tl.int64) * stride_scale + feature_block
        rows = rows * tl.load(place, mask=source >= 0, other=1.0)[:, None]
    return rows


@triton.jit
def load_stored_rows(row_data, row_scale, rows, features, feature_block, NUM_FEATURES, CAPACITY):
    """fp32 `(rows, features)`: rows of a row operand of NUM_FEATURES, rounded to bf16; the features of one block."""
    offsets = rows[:, None].to(tl.int64) * NUM_FEATURES + features[None, :]
    scale = tl.load(row_scale + feature_block.to(tl.int64) * CAPACITY + rows)
    values = tl.load(row_data + offsets).to(tl.float32) * scale[:, None]
    return values.to(tl.bfloat16).to(tl.float32)


@triton.jit
def load_row_weights(row_weights, source):
    """fp32, one for each of the rows `source`: ones if there are no weights, zeros on padding (-1)."""
    if row_weights is None:
        weights = tl.full(source.shape, 1.0, tl.float32)
    else:
        weights = tl.load(row_weights + source, mask=source >= 0, other=0.0).to(tl.float32)
    return weights


@triton.jit
def store_rows(
    parts, row_data, row_scale, row_start, feature_block, features, NUM_FEATURES, CAPACITY, POW2: tl.constexpr
):  # fmt: skip
    """Quantize a tile of 128 padded rows x 128 features along its features, into a row operand of NUM_FEATURES, a
    multiple of 128."""
    amaxes = ()
    for r in tl.static_range(16):
        amax = row_amax(parts[r])
        amaxes = amaxes + (amax,)
        factor = quantization_factor(amax, dequantization_scale(amax, POW2), POW2)
        offsets = rows_of_tile(row_start, r)[:, None].to(tl.int64) * NUM_FEATURES + features[None, :]
        tl.store(row_data + offsets, encode_e4m3(parts[r], factor[:, None]))
    scale = dequantization_scale(join_sixteen(amaxes).reshape(128), POW2)
    tl.store(row_scale + feature_block.to(tl.int64) * CAPACITY + row_start + tl.arange(0, 128), scale)


@triton.jit
def store_rows_of_tile(tile, row_data, row_scale, rows, feature_start, NUM_FEATURES, CAPACITY, POW2: tl.constexpr):
    """Quantize `(rows, 128)` along the features from `feature_start` on, into a row operand."""
    amax = row_amax(tile)
    scale = dequantization_scale(amax, POW2)
    codes = encode_e4m3(tile, quantization_factor(amax, scale, POW2)[:, None])
    offsets = rows[:, None].to(tl.int64) * NUM_FEATURES + feature_start + tl.arange(0, 128)[None, :]
    tl.store(row_data + offsets, codes)
    tl.store(row_scale + (feature_start // 128).to(tl.int64) * CAPACITY + rows, scale)


@triton.jit
def store_tokens(
    parts, tile_amax, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
    NUM_FEATURES, CAPACITY, PER_EXPERT: tl.constexpr, POW2: tl.constexpr, MASK_FEATURES: tl.constexpr = False,
):  # fmt: skip
    """Quantize 128 padded rows along these rows, feature by feature, into a token operand: as a tile, or, where the
    maxima `tile_amax` are given, as part of a long one. With MASK_FEATURES some features may lie past NUM_FEATURES."""
    scale_offsets = row_block.to(tl.int64) * NUM_FEATURES + features
    offsets = token_offsets(padded_ends, expert, row_start, features, NUM_FEATURES, CAPACITY, PER_EXPERT)
    if MASK_FEATURES:
        inside = features < NUM_FEATURES
        amax = column_amax(parts) if tile_amax is None else tl.load(tile_amax + scale_offsets, mask=inside, other=0.0)
        scale, factor = token_scaling(amax, tile_amax is not None, POW2)
        tl.store(token_data + offsets, encode_columns(parts, factor, 128), mask=inside[:, None])
        tl.store(token_scale + scale_offsets, scale, mask=inside)
    else:
        amax = column_amax(parts) if tile_amax is None else tl.load(tile_amax + scale_offsets)
        scale, factor = token_scaling(amax, tile_amax is not None, POW2)
        tl.store(token_data + offsets, encode_columns(parts, factor, 128))
        tl.store(token_scale + scale_offsets, scale)


@triton.jit
def quantize_activation_kernel(
    x,  # (M, NUM_FEATURES) bf16, fp16, fp32, or codes, e4m3; any strides
    x_scale,  # of codes: fp32 (M, feature blocks), blocks contiguous; else None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES in whole blocks); fp32 stored (that / 128, CAPACITY)
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    stride_row, stride_feature, stride_scale, NUM_FEATURES, CAPACITY,
    PER_EXPERT: tl.constexpr, POW2: tl.constexpr, MASK_FEATURES: tl.constexpr,
):  # fmt: skip
    """One program quantizes 128 padded rows x 128 features, as rows, tokens or both; outputs that are None are
    skipped. MASK_FEATURES says that NUM_FEATURES is no multiple of 128."""
    # One grid axis: the others are limited to 65535 blocks. Neighbours share rows, so their reads share DRAM pages.
    feature_blocks = tl.cdiv(NUM_FEATURES, 128)
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

    features_end = NUM_FEATURES if MASK_FEATURES else None
    parts = ()
    for r in tl.static_range(16):
        part = load_rows(
            x, sources[r], features, stride_row, stride_feature, features_end, x_scale, stride_scale, feature_block
        )  # fmt: skip
        parts = parts + (part,)
    if row_data is not None:
        store_rows(parts, row_data, row_scale, row_start, feature_block, features, feature_blocks * 128, CAPACITY, POW2)
    if token_data is not None:
        store_tokens(
            parts, None, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
            NUM_FEATURES, CAPACITY, PER_EXPERT, POW2, MASK_FEATURES,
        )  # fmt: skip


def launch_quantize_activation(
    x: Tensor, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand | None, *, pow2: bool,
    x_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Quantize `x` `(M, D)`, `D` any size, into the operands given, in one pass. `x` may be codes with `x_scale`."""
    num_features, capacity = x.shape[1], groups.capacity
    blocks = (capacity // BLOCK) * ceil_div(num_features, BLOCK)
    if blocks == 0:
        return
    launch(
        quantize_activation_kernel, blocks,
        x, x_scale,
        groups.row_source, groups.row_expert, groups.padded_ends,
        rows and rows.data, rows and rows.stored_scale, tokens and tokens.data, tokens and tokens.stored_scale,
        x.stride(0), x.stride(1), 0 if x_scale is None else x_scale.stride(0), num_features, capacity,
        PER_EXPERT=tokens is not None and tokens.layout is TokenLayout.PER_EXPERT, POW2=pow2,
        MASK_FEATURES=num_features % BLOCK != 0,
        num_warps=4,  # on an H200: 8 are slower throughout, though fewer registers let more threads run
    )  # fmt: skip
