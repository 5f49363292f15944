"""Kernel: a weight `(E, N, K)` to the operands of forward and dgrad, either or both from one read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.quantize.numerics import encode_e4m3, encode_words, magnitude_bits, tile_scale


@triton.jit
def quantize_weight_kernel(
    w,  # (E, N, K) bf16, fp16 or fp32, any strides
    forward_data,  # e4m3 (E, N, K)
    dgrad_words,  # e4m3 (E, K, N) as int32 (E, K, N / 4)
    scale,  # fp32 (E, N / 128, K / 128)
    stride_expert, stride_n, stride_k, N, K,
    POW2: tl.constexpr,
):  # fmt: skip
    """One program quantizes one 128 x 128 block, for forward, dgrad or both: what is None is not made."""
    block = tl.program_id(0)  # also the block's place among the scales
    k_block = block % (K // 128)
    n_block = block // (K // 128) % (N // 128)
    expert = (block // (K // 128) // (N // 128)).to(tl.int64)

    n = n_block.to(tl.int64) * 128 + 4 * tl.arange(0, 32)  # of the first quarter, see encode_words
    k = k_block.to(tl.int64) * 128 + tl.arange(0, 128)
    addresses = w + expert * stride_expert + n[:, None] * stride_n + k[None, :] * stride_k
    tile_0 = tl.load(addresses).to(tl.float32)
    tile_1 = tl.load(addresses + stride_n).to(tl.float32)
    tile_2 = tl.load(addresses + 2 * stride_n).to(tl.float32)
    tile_3 = tl.load(addresses + 3 * stride_n).to(tl.float32)

    bits_01 = tl.maximum(magnitude_bits(tile_0), magnitude_bits(tile_1))
    bits_23 = tl.maximum(magnitude_bits(tile_2), magnitude_bits(tile_3))
    amax_bits = tl.max(tl.max(tl.maximum(bits_01, bits_23), axis=1), axis=0)  # along rows first: within a warp
    block_scale, factor = tile_scale(amax_bits, POW2)
    tl.store(scale + block, block_scale)
    if forward_data is not None:
        codes = forward_data + expert * N * K + n[:, None] * K + k[None, :]
        tl.store(codes, encode_e4m3(tile_0, factor))
        tl.store(codes + K, encode_e4m3(tile_1, factor))
        tl.store(codes + 2 * K, encode_e4m3(tile_2, factor))
        tl.store(codes + 3 * K, encode_e4m3(tile_3, factor))
    if dgrad_words is not None:
        n_words = n_block.to(tl.int64) * 32 + tl.arange(0, 32)
        words = dgrad_words + expert * (N // 4) * K + k[:, None] * (N // 4) + n_words[None, :]
        tl.store(words, tl.trans(encode_words(tile_0, tile_1, tile_2, tile_3, factor)))


def launch_quantize_weight(
    w: Tensor, forward_data: Tensor | None, dgrad_data: Tensor | None, scale: Tensor, *, pow2: bool
) -> None:
    """Quantize `w` `(E, N, K)` into `scale` `(E, N/128, K/128)` and the codes given: `(E, N, K)`, `(E, K, N)`, both."""
    _, n, k = w.shape
    if scale.numel() == 0:
        return
    quantize_weight_kernel[(scale.numel(),)](
        w, forward_data, None if dgrad_data is None else dgrad_data.view(torch.int32), scale,
        w.stride(0), w.stride(1), w.stride(2), n, k,
        POW2=pow2,
        num_warps=8,
    )  # fmt: skip
