"""Kernel: a weight `(E, N, K)` to the operands of forward and dgrad, either or both from one read."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.quantize.numerics import (
    column_amax,
    dequantization_scale,
    encode_columns,
    encode_e4m3,
    maximum,
    quantization_factor,
    rows_of_tile,
)


@triton.jit
def quantize_weight_kernel(
    w,  # (E, N, K) bf16, fp16 or fp32, any strides
    forward_data,  # e4m3 (E, N, K)
    dgrad_data,  # e4m3 (E, K, N)
    scale,  # fp32 (E, N / 128, K / 128)
    stride_expert, stride_n, stride_k, N, K,
    POW2: tl.constexpr,
):  # fmt: skip
    """One program quantizes one 128 x 128 block, for forward, dgrad or both: what is None is not made."""
    block = tl.program_id(0)  # also the block's place among the scales
    k_block = block % (K // 128)
    n_block = block // (K // 128) % (N // 128)
    expert = (block // (K // 128) // (N // 128)).to(tl.int64)

    n_start = n_block.to(tl.int64) * 128
    k = k_block.to(tl.int64) * 128 + tl.arange(0, 128)
    parts = ()
    for r in tl.static_range(16):
        n = rows_of_tile(n_start, r)
        addresses = w + expert * stride_expert + n[:, None] * stride_n + k[None, :] * stride_k
        parts = parts + (tl.load(addresses).to(tl.float32),)
    amax = tl.reduce(column_amax(parts), 0, maximum)
    block_scale = dequantization_scale(amax, POW2)
    factor = quantization_factor(amax, block_scale, POW2)
    tl.store(scale + block, block_scale)
    if forward_data is not None:
        for r in tl.static_range(16):
            n = rows_of_tile(n_start, r)
            tl.store(forward_data + expert * N * K + n[:, None] * K + k[None, :], encode_e4m3(parts[r], factor))
    if dgrad_data is not None:
        n = n_start + tl.arange(0, 128)
        tl.store(dgrad_data + expert * N * K + k[:, None] * N + n[None, :], encode_columns(parts, factor, 128))


def launch_quantize_weight(
    w: Tensor, forward_data: Tensor | None, dgrad_data: Tensor | None, scale: Tensor, *, pow2: bool
) -> None:
    """Quantize `w` `(E, N, K)` into `scale` `(E, N/128, K/128)` and the codes given: `(E, N, K)`, `(E, K, N)`, both."""
    _, n, k = w.shape
    if scale.numel() == 0:
        return
    quantize_weight_kernel[(scale.numel(),)](
        w, forward_data, dgrad_data, scale,
        w.stride(0), w.stride(1), w.stride(2), n, k,
        POW2=pow2,
        num_warps=4,
    )  # fmt: skip
