"""Kernels: tokens to the messages that carry them to other ranks, and messages to operands."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.activations import store_tokens
from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from
from fp8moe.kernels.numerics import (
    dequantization_scale,
    encode_e4m3,
    quantization_factor,
    row_amax,
    rows_of_tile,
)
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand

TOKENS = 32  # of a program of `pack_kernel`


@triton.jit
def pack_kernel(
    x,  # (T, H) bf16, fp16 or fp32, any strides
    slots,  # int32 (T, k) contiguous
    values,  # e4m3 (N, H in whole blocks), or bf16 (N, H), features contiguous
    scale,  # fp32 (N, H in blocks), blocks contiguous; None for bf16
    stride_token, stride_feature, stride_message, stride_scale, T, H,
    CHOICES: tl.constexpr, TOKENS: tl.constexpr, MASK_FEATURES: tl.constexpr,
):  # fmt: skip
    """One program writes TOKENS tokens x 128 features to all messages of the tokens. MASK_FEATURES says that H is no
    multiple of 128."""
    feature_blocks = tl.cdiv(H, 128)
    token = (tl.program_id(0) // feature_blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    feature_block = tl.program_id(0) % feature_blocks
    feature = feature_block * 128 + tl.arange(0, 128)
    inside = (token < T)[:, None]
    if MASK_FEATURES:
        inside = inside & (feature < H)[None, :]
    offsets = token[:, None] * stride_token + feature[None, :].to(tl.int64) * stride_feature
    tile = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        amax = row_amax(tile)
        tile_scale = dequantization_scale(amax, True)
        written = encode_e4m3(tile, quantization_factor(amax, tile_scale, True)[:, None])
    else:
        written = tile.to(tl.bfloat16)
    for choice in range(CHOICES):
        slot = tl.load(slots + token * CHOICES + choice, mask=token < T, other=-1).to(tl.int64)
        wanted = (slot >= 0)[:, None]
        if scale is None:
            wanted = wanted & inside
        tl.store(values + slot[:, None] * stride_message + feature[None, :], written, mask=wanted)
        if scale is not None:
            tl.store(scale + slot * stride_scale + feature_block, tile_scale, mask=slot >= 0)


def launch_pack(x: Tensor, slots: Tensor, values: Tensor, scale: Tensor | None) -> None:
    """Write `x[t]` to the messages `slots[t, j]`, but for those of -1: to `values` as bf16, or, if `scale` is given, as
    e4m3 with scales that are powers of two."""
    num_tokens, num_features = x.shape
    blocks = ceil_div(num_tokens, TOKENS) * ceil_div(num_features, BLOCK)
    if blocks == 0:
        return
    launch(
        pack_kernel, blocks,
        x, slots, values, scale,
        x.stride(0), x.stride(1), values.stride(0), 0 if scale is None else scale.stride(0), num_tokens, num_features,
        CHOICES=slots.shape[1], TOKENS=TOKENS, MASK_FEATURES=num_features % BLOCK != 0, num_warps=4,
    )  # fmt: skip


@triton.jit
def pack_choices_kernel(
    topk_ids, topk_weights,  # integers and floats (T, k) contiguous
    slots,  # int32 (T, k) contiguous
    ids, weights,  # int32 and fp32 (N, k), choices contiguous
    stride_ids, stride_weights, T, NUM_EXPERTS,
    CHOICES: tl.constexpr, PADDED_CHOICES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program writes the choices of TOKENS tokens to all their messages."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    choice = tl.arange(0, PADDED_CHOICES)
    inside = (token < T)[:, None] & (choice < CHOICES)[None, :]
    offsets = token[:, None] * CHOICES + choice[None, :]
    chosen = tl.load(topk_ids + offsets, mask=inside, other=0).to(tl.int64)
    weight = tl.load(topk_weights + offsets, mask=inside, other=0.0).to(tl.float32)
    for number in range(CHOICES):
        slot = tl.load(slots + token * CHOICES + number, mask=token < T, other=-1).to(tl.int64)
        wanted = inside & (slot >= 0)[:, None]
        # Ids that have a slot are not negative, where this division would not round down.
        own = tl.load(topk_ids + token * CHOICES + number, mask=slot >= 0, other=0).to(tl.int64)
        local = chosen - (own // NUM_EXPERTS * NUM_EXPERTS)[:, None]
        local = tl.where((local >= 0) & (local < NUM_EXPERTS), local, -1)
        tl.store(ids + slot[:, None] * stride_ids + choice[None, :], local.to(tl.int32), mask=wanted)
        tl.store(weights + slot[:, None] * stride_weights + choice[None, :], weight, mask=wanted)


def launch_pack_choices(
    topk_ids: Tensor, topk_weights: Tensor, slots: Tensor, ids: Tensor, weights: Tensor, num_experts: int
) -> None:
    """Write the ids and weights of all choices of a token to its messages `slots[t, j]`, but for those of -1: ids as
    they are numbered on the rank of choice `j`, and -1 for choices of other ranks."""
    num_tokens, choices = topk_ids.shape
    if num_tokens == 0:
        return
    padded = power_of_2_from(choices)
    tokens = max(1, 512 // padded)
    launch(
        pack_choices_kernel, ceil_div(num_tokens, tokens),
        topk_ids, topk_weights, slots, ids, weights, ids.stride(0), weights.stride(0), num_tokens, num_experts,
        CHOICES=choices, PADDED_CHOICES=padded, TOKENS=tokens, num_warps=4,
    )  # fmt: skip


@triton.jit
def unpack_operands_kernel(
    codes, scale,  # e4m3 (N, NUM_FEATURES in whole blocks); fp32 (N, that / 128); of a message contiguous
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES in whole blocks); fp32 stored (that / 128, CAPACITY)
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    stride_message, stride_scale, NUM_FEATURES, CAPACITY,
    PER_EXPERT: tl.constexpr, MASK_FEATURES: tl.constexpr,
):  # fmt: skip
    """One program makes 128 padded rows x 128 features of the messages they copy, as rows, tokens or both; outputs that
    are None are skipped. MASK_FEATURES says that NUM_FEATURES is no multiple of 128."""
    feature_blocks = tl.cdiv(NUM_FEATURES, 128)
    row_block = tl.program_id(0) // feature_blocks
    feature_block = tl.program_id(0) % feature_blocks
    row_start = row_block * 128
    features = feature_block * 128 + tl.arange(0, 128)
    expert = tl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    if expert < 0:
        return

    if row_data is not None:
        rows = row_start + tl.arange(0, 128)
        source = tl.load(row_source + rows).to(tl.int64)
        of_rows = tl.load(scale + source * stride_scale + feature_block, mask=source >= 0, other=1.0)
        tl.store(row_scale + feature_block.to(tl.int64) * CAPACITY + rows, of_rows)
    parts = ()
    for r in tl.static_range(16):
        rows = rows_of_tile(row_start, r)
        source = tl.load(row_source + rows).to(tl.int64)
        inside = (source >= 0)[:, None]
        part = tl.load(codes + source[:, None] * stride_message + features[None, :], mask=inside, other=0.0)
        if row_data is not None:
            tl.store(row_data + rows[:, None].to(tl.int64) * (feature_blocks * 128) + features[None, :], part)
        if token_data is not None:
            of_part = tl.load(scale + source * stride_scale + feature_block, mask=source >= 0, other=1.0)
            parts = parts + (part.to(tl.float32) * of_part[:, None],)
    if token_data is not None:
        store_tokens(
            parts, None, token_data, token_scale, padded_ends, expert, row_block, row_start, features,
            NUM_FEATURES, CAPACITY, PER_EXPERT, True, MASK_FEATURES,
        )  # fmt: skip


def launch_unpack_operands(
    codes: Tensor, scale: Tensor, groups: TokenGroups, num_features: int, rows: RowOperand | None,
    tokens: TokenOperand | None,
) -> None:  # fmt: skip
    """Gather messages into the operands given, in one pass; `groups.row_source` numbers messages."""
    capacity = groups.capacity
    blocks = (capacity // BLOCK) * ceil_div(num_features, BLOCK)
    if blocks == 0:
        return
    launch(
        unpack_operands_kernel, blocks,
        codes, scale,
        groups.row_source, groups.row_expert, groups.padded_ends,
        rows and rows.data, rows and rows.stored_scale, tokens and tokens.data, tokens and tokens.stored_scale,
        codes.stride(0), scale.stride(0), num_features, capacity,
        PER_EXPERT=tokens is not None and tokens.layout is TokenLayout.PER_EXPERT,
        MASK_FEATURES=num_features % BLOCK != 0, num_warps=4,
    )  # fmt: skip
