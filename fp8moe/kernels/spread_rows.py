"""Kernel: each token quantized once, and its codes written to all its rows: a row operand from one read of the tokens.
Tokens that are quantized already, because they have travelled, are written as they are.

Gathering, as `activations.py` does it, quantizes a token again for each of its rows. What tokens need cannot be shared
so: a scale of theirs belongs to 128 rows of one expert.
"""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.activations import load_rows
from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.kernels.numerics import dequantization_scale, encode_e4m3, quantization_factor, row_amax
from fp8moe.operands import BLOCK, RowOperand, TokenGroups

TOKENS = 16
"""Of a program: 16 codes a thread, a vector. Neighbouring tokens of an expert have neighbouring scales."""


@triton.jit
def store_tiles(codes, scale, row, row_data, row_scale, feature_block, NUM_FEATURES, CAPACITY):
    """Write tiles of 128 features to the padded rows `row` of a row operand of NUM_FEATURES, but for those below 0."""
    offsets = row[:, None].to(tl.int64) * NUM_FEATURES + feature_block * 128 + tl.arange(0, 128)[None, :]
    tl.store(row_data + offsets, codes, mask=(row >= 0)[:, None])
    tl.store(row_scale + feature_block.to(tl.int64) * CAPACITY + row, scale, mask=row >= 0)


@triton.jit
def spread_rows_kernel(
    x,  # (T, NUM_FEATURES) bf16, fp16 or fp32, any strides; or codes, e4m3, NUM_FEATURES a multiple of 128
    x_scale,  # of codes: fp32 (T, feature blocks), blocks contiguous; else None
    choice_row,  # int32 (T, CHOICES) contiguous
    token_row, ends, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES in whole blocks); fp32 stored (that / 128, CAPACITY)
    stride_token, stride_feature, stride_scale, T, NUM_FEATURES, CAPACITY,
    CHOICES: tl.constexpr, TOKENS: tl.constexpr, POW2: tl.constexpr, MASK_FEATURES: tl.constexpr,
):  # fmt: skip
    """One program quantizes TOKENS tokens x 128 features, or, after the last token, pads the group of one expert in as
    many features. MASK_FEATURES says that NUM_FEATURES is no multiple of 128."""
    feature_blocks = tl.cdiv(NUM_FEATURES, 128)
    block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    expert = block - tl.cdiv(T, TOKENS)
    if expert < 0:
        token = block * TOKENS + tl.arange(0, TOKENS)
        rows = ()  # all at once, so that they wait for memory together, and with the tile
        for choice in tl.static_range(CHOICES):
            place = choice_row + token.to(tl.int64) * CHOICES + choice
            rows = rows + (tl.load(place, mask=token < T, other=-1),)
        features = feature_block * 128 + tl.arange(0, 128)
        if x_scale is not None:
            places = x + token[:, None].to(tl.int64) * stride_token + features[None, :].to(tl.int64) * stride_feature
            codes = tl.load(places, mask=(token < T)[:, None], other=0.0)
            place = x_scale + token.to(tl.int64) * stride_scale + feature_block
            scale = tl.load(place, mask=token < T, other=1.0)
        else:
            features_end = NUM_FEATURES if MASK_FEATURES else None
            tile = load_rows(x, tl.where(token < T, token, -1), features, stride_token, stride_feature, features_end)
        padded_rows = ()
        for choice in tl.static_range(CHOICES):
            row = rows[choice]
            padded_rows = padded_rows + (tl.load(token_row + row, mask=row >= 0, other=-1),)
        if x_scale is None:
            amax = row_amax(tile)
            scale = dequantization_scale(amax, POW2)
            codes = encode_e4m3(tile, quantization_factor(amax, scale, POW2)[:, None])
        for choice in tl.static_range(CHOICES):
            store_tiles(
                codes, scale, padded_rows[choice], row_data, row_scale, feature_block, feature_blocks * 128, CAPACITY
            )
    else:
        end, start = tl.load(ends + expert), tl.load(ends + expert - 1, mask=expert > 0, other=0)
        padded_end = tl.load(padded_ends + expert)
        padded_start = tl.load(padded_ends + expert - 1, mask=expert > 0, other=0)
        codes = tl.zeros((TOKENS, 128), tl.float32).to(tl.float8e4nv)
        scale = dequantization_scale(tl.zeros((TOKENS,), tl.float32), POW2)
        for first in range(padded_start + end - start, padded_end, TOKENS):
            row = first + tl.arange(0, TOKENS)
            row = tl.where(row < padded_end, row, -1)
            store_tiles(codes, scale, row, row_data, row_scale, feature_block, feature_blocks * 128, CAPACITY)


def launch_spread_rows(
    x: Tensor, choice_row: Tensor, groups: TokenGroups, rows: RowOperand, *, pow2: bool, x_scale: Tensor | None = None
) -> None:
    """Quantize the tokens `x` `(T, D)`, `D` any size, into the `rows` of their choices, contiguous `(T, k)`. If they
    have an `x_scale`, they are codes, and `D` is a multiple of 128."""
    num_tokens, num_features = x.shape
    if num_tokens == 0:
        return
    blocks = ceil_div(num_tokens, TOKENS) + groups.num_groups
    launch(
        spread_rows_kernel, blocks * ceil_div(num_features, BLOCK),
        x, x_scale, choice_row, groups.token_row, groups.ends, groups.padded_ends, *rows.tensors,
        x.stride(0), x.stride(1), 0 if x_scale is None else x_scale.stride(0), num_tokens, num_features,
        groups.capacity,
        CHOICES=choice_row.shape[1], TOKENS=TOKENS, POW2=pow2, MASK_FEATURES=num_features % BLOCK != 0,
        num_warps=4,
    )  # fmt: skip
