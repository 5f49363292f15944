"""Kernel: a weight `(E, N, K)` to the operands of forward and dgrad, either or both from one read.

Two weights whose elements alternate in memory, such as interleaved gate and up stored `(E, K, N)`, are read as pairs.
"""

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
from fp8moe.kernels.pairs import amax_of_pairs, one_of_parts, pointer_to_pairs

PROGRAMS_A_MULTIPROCESSOR = 2
"""Programs of 8 warps that fit on a multiprocessor at a time, where a thread takes no more than `REGISTERS`."""

REGISTERS = 128
"""Left alone, ptxas takes more, to unpack or encode more floats at a time."""


@triton.jit
def quantize_block(
    block, weight, forward, dgrad, scales, POW2: tl.constexpr, MASK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Quantize one 128 x 128 block, for forward, dgrad or both. With MASK it may reach past N and K: zeros there.

    With PAIRS, these are two blocks, and K and the strides of the weight count pairs. Of each row of blocks, those of
    the first floats come first.
    """
    w, stride_expert, stride_n, stride_k, N, K = weight
    forward_data, forward_stride_expert, forward_stride_n = forward
    dgrad_data, dgrad_stride_expert, dgrad_stride_k = dgrad
    scale, scale_stride_expert, scale_stride_n, scale_stride_k = scales

    k_blocks = tl.cdiv(K, 128)
    n_blocks = tl.cdiv(N, 128)
    k_block = block % k_blocks
    n_block = block // k_blocks % n_blocks
    expert = (block // k_blocks // n_blocks).to(tl.int64)

    n_start = n_block.to(tl.int64) * 128
    k = k_block.to(tl.int64) * 128 + tl.arange(0, 128)
    dtype: tl.constexpr = w.dtype.element_ty
    if PAIRS:
        w = pointer_to_pairs(w)
    parts = ()
    for r in tl.static_range(16):
        n = rows_of_tile(n_start, r)
        addresses = w + expert * stride_expert + n[:, None] * stride_n + k[None, :] * stride_k
        part = tl.load(addresses, mask=(n < N)[:, None] & (k < K)[None, :], other=0) if MASK else tl.load(addresses)
        parts = parts + (part if PAIRS else part.to(tl.float32),)
    for number in tl.static_range(2 if PAIRS else 1):
        amax = amax_of_pairs(parts, number, dtype) if PAIRS else tl.reduce(column_amax(parts), 0, maximum)
        floats = one_of_parts(parts, number, dtype) if PAIRS else parts
        block_scale = dequantization_scale(amax, POW2)
        factor = quantization_factor(amax, block_scale, POW2)
        scale_offset = expert * scale_stride_expert + n_block * scale_stride_n + k_block * scale_stride_k
        tl.store(scale + scale_offset, block_scale)
        if forward_data is not None:
            for r in tl.static_range(16):
                n = rows_of_tile(n_start, r)
                offsets = expert * forward_stride_expert + n[:, None] * forward_stride_n + k[None, :]
                tl.store(forward_data + offsets, encode_e4m3(floats[r], factor))
        if dgrad_data is not None:
            n = n_start + tl.arange(0, 128)
            offsets = expert * dgrad_stride_expert + k[:, None] * dgrad_stride_k + n[None, :]
            tl.store(dgrad_data + offsets, encode_columns(floats, factor, 128))
        k_block += k_blocks
        k += k_blocks * 128


@triton.jit
def quantize_task(
    task, weight, forward, dgrad, scales, POW2: tl.constexpr, MASK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A block; or, where pairs are quantized for both, a block for one of them. Registers are too few for both at once,
    so the neighbouring program, which runs at the same time, reads the same pairs from the cache."""
    if PAIRS and forward[0] is not None and dgrad[0] is not None:
        if task % 2 == 0:
            quantize_block(task // 2, weight, forward, (None, 0, 0), scales, POW2, MASK, PAIRS)
        else:
            quantize_block(task // 2, weight, (None, 0, 0), dgrad, scales, POW2, MASK, PAIRS)
    else:
        quantize_block(task, weight, forward, dgrad, scales, POW2, MASK, PAIRS)


@triton.jit
def quantize_weight_kernel(
    w,  # (E, N, K) bf16, fp16 or fp32, any strides; with PAIRS (E, N, 2 K)
    forward_data, forward_stride_expert, forward_stride_n,  # e4m3 (E, N, K) in whole blocks, or None
    dgrad_data, dgrad_stride_expert, dgrad_stride_k,  # e4m3 (E, K, N) in whole blocks, or None
    scale, scale_stride_expert, scale_stride_n, scale_stride_k,  # fp32, one for each block
    changed,  # int32 (chunks,), of `find_changes`, or None
    stride_expert, stride_n, stride_k, N, K, tasks, chunks,
    POW2: tl.constexpr, MASK: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program does one task. With `changed`, it goes from task to task, unless nothing has changed."""
    weight = (w, stride_expert, stride_n, stride_k, N, K)
    forward = (forward_data, forward_stride_expert, forward_stride_n)
    dgrad = (dgrad_data, dgrad_stride_expert, dgrad_stride_k)
    scales = (scale, scale_stride_expert, scale_stride_n, scale_stride_k)
    if changed is None:
        quantize_task(tl.program_id(0), weight, forward, dgrad, scales, POW2, MASK, PAIRS)
    else:
        chunk = tl.arange(0, CHUNKS)
        if tl.max(tl.load(changed + chunk, mask=chunk < chunks, other=0), axis=0) != 0:
            for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
                quantize_task(task, weight, forward, dgrad, scales, POW2, MASK, PAIRS)


def launch_quantize_weight(
    w: Tensor, forward_data: Tensor | None, dgrad_data: Tensor | None, scale: Tensor, *, pow2: bool,
    pairs: bool = False, changed: Tensor | None = None, multiprocessors: int = 1,
) -> None:  # fmt: skip
    """Quantize `w` `(E, N, K)`, of any size and strides, into `scale` and the codes given, `(E, N, K)` and `(E, K, N)`
    in whole blocks of 128, of which those past the weight's own size become zeros.

    The outputs may be slices of larger ones; the last dimensions of the codes are contiguous. With `pairs`, the outputs
    have along N first the rows with even numbers, in whole blocks, and then those with odd ones, likewise; `w` is
    contiguous along N, and aligned to pairs: N, its other strides and its address are even. With `changed`, int32
    `(chunks,)`, nothing is written if all of it is 0, and `multiprocessors` is how many the GPU has.
    """
    if w.stride(1) < w.stride(2):
        # Neighbouring threads read neighbours along the last dimension: of the transposed weight, which has the same
        # operands the other way round.
        w, scale, forward_data, dgrad_data = w.transpose(1, 2), scale.transpose(1, 2), dgrad_data, forward_data
    (_, n, k), strides, tasks = w.shape, w.stride(), scale.numel()
    options: dict[str, int] = {"num_warps": 4}
    if pairs or changed is not None:
        options = {"num_warps": 8} if pairs and w.element_size() == 4 else {"num_warps": 8, "maxnreg": REGISTERS}
    if pairs:
        k, strides = k // 2, (strides[0] // 2, strides[1] // 2, 1)
        if forward_data is None or dgrad_data is None:
            tasks //= 2
    if tasks == 0:
        return
    chunks = 0 if changed is None else changed.numel()
    launch(
        quantize_weight_kernel,
        tasks if changed is None else min(tasks, multiprocessors * PROGRAMS_A_MULTIPROCESSOR),
        w,
        forward_data, *((0, 0) if forward_data is None else forward_data.stride()[:2]),
        dgrad_data, *((0, 0) if dgrad_data is None else dgrad_data.stride()[:2]),
        scale, *scale.stride(),
        changed,
        *strides, n, k, tasks, chunks,
        POW2=pow2, MASK=n % 128 != 0 or k % 128 != 0, PAIRS=pairs, CHUNKS=power_of_2_from(max(chunks, 1)),
        **options,
    )  # fmt: skip
