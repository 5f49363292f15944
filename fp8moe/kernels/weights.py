"""Kernel: a weight `(E, N, K)` to the operands of forward and dgrad, either or both from one read."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import launch, power_of_2_from
from fp8moe.kernels.numerics import (
    column_amax,
    dequantization_scale,
    encode_columns,
    encode_e4m3,
    maximum,
    quantization_factor,
    rows_of_tile,
)

PROGRAMS_A_MULTIPROCESSOR = 2
"""Programs of 8 warps that fit on a multiprocessor at a time, where each does block after block."""


@triton.jit
def quantize_block(
    block, w, forward_data, forward_stride_expert, forward_stride_n, dgrad_data, dgrad_stride_expert, dgrad_stride_k,
    scale, scale_stride_expert, scale_stride_n, scale_stride_k, stride_expert, stride_n, stride_k, N, K,
    POW2: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Quantize one 128 x 128 block, for forward, dgrad or both. With MASK it may reach past N and K: zeros there."""
    k_blocks = tl.cdiv(K, 128)
    n_blocks = tl.cdiv(N, 128)
    k_block = block % k_blocks
    n_block = block // k_blocks % n_blocks
    expert = (block // k_blocks // n_blocks).to(tl.int64)

    n_start = n_block.to(tl.int64) * 128
    k = k_block.to(tl.int64) * 128 + tl.arange(0, 128)
    parts = ()
    for r in tl.static_range(16):
        n = rows_of_tile(n_start, r)
        addresses = w + expert * stride_expert + n[:, None] * stride_n + k[None, :] * stride_k
        part = tl.load(addresses, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0) if MASK else tl.load(addresses)
        parts = parts + (part.to(tl.float32),)
    amax = tl.reduce(column_amax(parts), 0, maximum)
    block_scale = dequantization_scale(amax, POW2)
    factor = quantization_factor(amax, block_scale, POW2)
    scale_offset = expert * scale_stride_expert + n_block * scale_stride_n + k_block * scale_stride_k
    tl.store(scale + scale_offset, block_scale)
    if forward_data is not None:
        for r in tl.static_range(16):
            n = rows_of_tile(n_start, r)
            offsets = expert * forward_stride_expert + n[:, None] * forward_stride_n + k[None, :]
            tl.store(forward_data + offsets, encode_e4m3(parts[r], factor))
    if dgrad_data is not None:
        n = n_start + tl.arange(0, 128)
        offsets = expert * dgrad_stride_expert + k[:, None] * dgrad_stride_k + n[None, :]
        tl.store(dgrad_data + offsets, encode_columns(parts, factor, 128))


@triton.jit
def quantize_weight_kernel(
    w,  # (E, N, K) bf16, fp16 or fp32, any strides
    forward_data, forward_stride_expert, forward_stride_n,  # e4m3 (E, N, K) in whole blocks, or None
    dgrad_data, dgrad_stride_expert, dgrad_stride_k,  # e4m3 (E, K, N) in whole blocks, or None
    scale, scale_stride_expert, scale_stride_n, scale_stride_k,  # fp32, one for each block
    changed,  # int32 (chunks,), of `find_changes`, or None
    stride_expert, stride_n, stride_k, N, K, num_blocks, chunks,
    POW2: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program quantizes one block. With `changed`, it goes from block to block, unless nothing has changed."""
    if changed is None:
        quantize_block(
            tl.program_id(0), w, forward_data, forward_stride_expert, forward_stride_n,
            dgrad_data, dgrad_stride_expert, dgrad_stride_k, scale, scale_stride_expert, scale_stride_n, scale_stride_k,
            stride_expert, stride_n, stride_k, N, K, POW2, MASK,
        )  # fmt: skip
    else:
        chunk = tl.arange(0, CHUNKS)
        if tl.max(tl.load(changed + chunk, mask=chunk < chunks, other=0), axis=0) != 0:
            for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
                quantize_block(
                    block, w, forward_data, forward_stride_expert, forward_stride_n,
                    dgrad_data, dgrad_stride_expert, dgrad_stride_k,
                    scale, scale_stride_expert, scale_stride_n, scale_stride_k,
                    stride_expert, stride_n, stride_k, N, K, POW2, MASK,
                )  # fmt: skip


def launch_quantize_weight(
    w: Tensor, forward_data: Tensor | None, dgrad_data: Tensor | None, scale: Tensor, *, pow2: bool,
    changed: Tensor | None = None, multiprocessors: int = 1,
) -> None:  # fmt: skip
    """Quantize `w` `(E, N, K)`, of any size and strides, into `scale` and the codes given, `(E, N, K)` and `(E, K, N)`
    in whole blocks of 128, of which those past the weight's own size become zeros.

    The outputs may be slices of larger ones; the last dimensions of the codes are contiguous. With `changed`, int32
    `(chunks,)`, nothing is written if all of it is 0, and `multiprocessors` is how many the GPU has.
    """
    if w.stride(1) < w.stride(2):
        # Neighbouring threads read neighbours along the last dimension: of the transposed weight, which has the same
        # operands the other way round.
        w, scale, forward_data, dgrad_data = w.transpose(1, 2), scale.transpose(1, 2), dgrad_data, forward_data
    _, n, k = w.shape
    num_blocks = scale.numel()
    if num_blocks == 0:
        return
    chunks = 0 if changed is None else changed.numel()
    launch(
        quantize_weight_kernel,
        num_blocks if changed is None else min(num_blocks, multiprocessors * PROGRAMS_A_MULTIPROCESSOR),
        w,
        forward_data, *((0, 0) if forward_data is None else forward_data.stride()[:2]),
        dgrad_data, *((0, 0) if dgrad_data is None else dgrad_data.stride()[:2]),
        scale, *scale.stride(),
        changed,
        *w.stride(), n, k, num_blocks, chunks,
        POW2=pow2, MASK=n % 128 != 0 or k % 128 != 0, CHUNKS=power_of_2_from(max(chunks, 1)),
        num_warps=4 if changed is None else 8,
    )  # fmt: skip
