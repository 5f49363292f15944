"""Kernel: a weight `(E, N, K)` to the operands of forward and dgrad, either or both from one read."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import launch
from fp8moe.kernels.numerics import (
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
    forward_data, forward_stride_expert, forward_stride_n,  # e4m3 (E, N, K)
    dgrad_data, dgrad_stride_expert, dgrad_stride_k,  # e4m3 (E, K, N)
    scale, scale_stride_expert, scale_stride_n,  # fp32 (E, N / 128, K / 128)
    stride_expert, stride_n, stride_k, N, K,
    POW2: tl.constexpr,
):  # fmt: skip
    """One program quantizes one 128 x 128 block, for forward, dgrad or both: what is None is not made."""
    block = tl.program_id(0)
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
    tl.store(scale + expert * scale_stride_expert + n_block * scale_stride_n + k_block, block_scale)
    if forward_data is not None:
        for r in tl.static_range(16):
            n = rows_of_tile(n_start, r)
            offsets = expert * forward_stride_expert + n[:, None] * forward_stride_n + k[None, :]
            tl.store(forward_data + offsets, encode_e4m3(parts[r], factor))
    if dgrad_data is not None:
        n = n_start + tl.arange(0, 128)
        offsets = expert * dgrad_stride_expert + k[:, None] * dgrad_stride_k + n[None, :]
        tl.store(dgrad_data + offsets, encode_columns(parts, factor, 128))


def launch_quantize_weight(
    w: Tensor, forward_data: Tensor | None, dgrad_data: Tensor | None, scale: Tensor, *, pow2: bool
) -> None:
    """Quantize `w` `(E, N, K)` into `scale` `(E, N/128, K/128)` and the codes given: `(E, N, K)`, `(E, K, N)`, both.

    The outputs may be slices of larger ones; their last dimensions are contiguous.
    """
    _, n, k = w.shape
    if scale.numel() == 0:
        return
    launch(
        quantize_weight_kernel, scale.numel(),
        w,
        forward_data, *((0, 0) if forward_data is None else forward_data.stride()[:2]),
        dgrad_data, *((0, 0) if dgrad_data is None else dgrad_data.stride()[:2]),
        scale, *scale.stride()[:2],
        *w.stride(), n, k,
        POW2=pow2,
        num_warps=4,
    )  # fmt: skip
