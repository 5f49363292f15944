"""Kernels: tokens to the messages that carry them to other ranks."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from
from fp8moe.kernels.numerics import dequantization_scale, encode_e4m3, quantization_factor, row_amax
from fp8moe.operands import BLOCK

TOKENS = 32  # of a program of `pack_kernel`


@triton.jit
def pack_choices(
    topk_ids, topk_weights, slots, ids, weights, token, stride_ids, stride_weights, T, NUM_EXPERTS,
    CHOICES: tl.constexpr, PADDED_CHOICES: tl.constexpr,
):  # fmt: skip
    """Write the choices of the tokens `token` to all their messages."""
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


@triton.jit
def pack_kernel(
    x,  # (T, H) bf16, fp16 or fp32, any strides
    slots,  # int32 (T, k) contiguous
    values,  # e4m3 (N, H in whole blocks), or bf16 (N, H), features contiguous
    scale,  # fp32 (N, H in blocks), blocks contiguous; None for bf16
    topk_ids, topk_weights,  # integers and floats (T, k) contiguous, or None
    ids, weights,  # int32 and fp32 (N, k), choices contiguous, where there are these
    stride_token, stride_feature, stride_message, stride_scale, stride_ids, stride_weights, T, H, NUM_EXPERTS,
    CHOICES: tl.constexpr, PADDED_CHOICES: tl.constexpr, TOKENS: tl.constexpr, MASK_FEATURES: tl.constexpr,
):  # fmt: skip
    """One program writes TOKENS tokens x 128 features to all messages of the tokens, with the first features also their
    choices. MASK_FEATURES says that H is no multiple of 128."""
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
    if topk_ids is not None:  # noqa: SIM102  # known when it is compiled, the other when it runs
        if feature_block == 0:
            pack_choices(
                topk_ids, topk_weights, slots, ids, weights, token, stride_ids, stride_weights, T, NUM_EXPERTS,
                CHOICES, PADDED_CHOICES,
            )  # fmt: skip


def launch_pack(
    x: Tensor, slots: Tensor, values: Tensor, scale: Tensor | None, choices: "PackedChoices | None" = None
) -> None:
    """Write `x[t]` to the messages `slots[t, j]`, but for those of -1: to `values` as bf16, or, if `scale` is given, as
    e4m3 with scales that are powers of two; and the choices of the token, if they are given."""
    num_tokens, num_features = x.shape
    blocks = ceil_div(num_tokens, TOKENS) * ceil_div(num_features, BLOCK)
    if blocks == 0:
        return
    topk_ids, topk_weights, ids, weights, num_experts = choices or (None, None, None, None, 0)
    launch(
        pack_kernel, blocks,
        x, slots, values, scale, topk_ids, topk_weights, ids, weights,
        x.stride(0), x.stride(1), values.stride(0), 0 if scale is None else scale.stride(0),
        0 if ids is None else ids.stride(0), 0 if weights is None else weights.stride(0),
        num_tokens, num_features, num_experts,
        CHOICES=slots.shape[1], PADDED_CHOICES=power_of_2_from(slots.shape[1]), TOKENS=TOKENS,
        MASK_FEATURES=num_features % BLOCK != 0, num_warps=4,
    )  # fmt: skip


class PackedChoices(NamedTuple):
    """What a message holds of the choices of its token: numbered as on the rank of the choice that it belongs to, -1
    for choices of other ranks."""

    topk_ids: Tensor
    """Integers `(T, k)`, contiguous."""
    topk_weights: Tensor
    """Any float dtype `(T, k)`, contiguous."""
    ids: Tensor
    """Where they go: int32 `(N, k)`, choices contiguous."""
    weights: Tensor
    """Likewise, fp32."""
    num_experts: int
    """Of a rank."""
