"""Kernel: whether a weight has changed since it was last looked at, by a sample of its elements."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.operands import BLOCK

BLOCKS = 32
"""Read at once by a program: 128 sectors of 16 elements, a vector of 16 bytes a thread and more."""


@triton.jit
def mix_bits(x):
    """The finalizer of MurmurHash3 (Appleby, 2011): one-to-one on uint32."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def find_changes_kernel(
    bits,  # int16 or int32 (E, LINES, ELEMENTS), any strides: the weight, `fingerprint.as_lines`
    step,  # int32 (1,)
    known,  # int32 (chunks, 2): hash and step of each chunk of blocks when it was last looked at
    changed,  # int32 (chunks,)
    force, stride_expert, stride_line, stride_element, LINES, ELEMENTS, num_blocks, chunk_blocks,
    BLOCKS: tl.constexpr, SECTORS: tl.constexpr, SECTOR: tl.constexpr, SMALLER_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program does a chunk of blocks, BLOCKS of them at a time. SMALLER_BLOCKS says that there are some at the
    edges."""
    chunk = tl.program_id(0)
    first = chunk.to(tl.int64) * chunk_blocks
    end = tl.minimum(first + chunk_blocks, num_blocks)
    index = tl.arange(0, BLOCKS * SECTORS)
    within = tl.arange(0, SECTOR)
    total = tl.zeros((BLOCKS * SECTORS,), tl.uint32)
    line_blocks = tl.cdiv(LINES, 128)
    element_blocks = tl.cdiv(ELEMENTS, 128)
    for start in range(first, end, BLOCKS):
        block = start + index // SECTORS
        number = index % SECTORS
        expert = block // element_blocks // line_blocks
        first_line = block // element_blocks % line_blocks * 128
        first_element = block % element_blocks * 128
        line = (number * (128 // SECTORS) + block * 29) % 128
        run = (block * 5 + number * 3) % (128 // SECTOR)
        inside = (block < end)[:, None]
        if SMALLER_BLOCKS:
            line = line.to(tl.int32) % tl.minimum(LINES - first_line, 128).to(tl.int32)
            runs = tl.minimum((ELEMENTS - first_element + SECTOR - 1) // SECTOR, 128 // SECTOR)
            run = run.to(tl.int32) % runs.to(tl.int32)
            inside = inside & ((first_element + run * SECTOR)[:, None] + within[None, :] < ELEMENTS)
        element = first_element + run * SECTOR
        sector = expert * stride_expert + (first_line + line) * stride_line + element * stride_element
        values = tl.load(bits + sector[:, None] + (within * stride_element)[None, :], mask=inside, other=0)
        place = (block * SECTORS + number)[:, None] * SECTOR + within[None, :]
        mixed = mix_bits(values.to(tl.uint32) ^ (place.to(tl.uint32) * 0x9E3779B1))
        total += tl.sum(tl.where(inside, mixed, 0), axis=1)
    found = tl.sum(total, axis=0).to(tl.int32, bitcast=True)
    this_step = tl.load(step)
    hash_is_known = tl.load(known + 2 * chunk) == found
    step_is_known = tl.load(known + 2 * chunk + 1) == this_step
    tl.store(changed + chunk, tl.where(hash_is_known & step_is_known & (force == 0), 0, 1))
    tl.store(known + 2 * chunk, found)
    tl.store(known + 2 * chunk + 1, this_step)


def launch_find_changes(
    bits: Tensor, step: Tensor, known: Tensor, changed: Tensor, *, force: bool, sectors: int, sector: int
) -> None:
    """As `fingerprint.find_changes`; `bits` is `(E, lines, elements)`, int16 or int32."""
    num_experts, lines, elements = bits.shape
    num_blocks, chunks = num_experts * ceil_div(lines, BLOCK) * ceil_div(elements, BLOCK), changed.numel()
    launch(
        find_changes_kernel, chunks,
        bits, step, known, changed, int(force), *bits.stride(), lines, elements,
        num_blocks, ceil_div(num_blocks, chunks),
        BLOCKS=BLOCKS, SECTORS=sectors, SECTOR=sector, SMALLER_BLOCKS=lines % BLOCK != 0 or elements % BLOCK != 0,
        num_warps=4,
    )  # fmt: skip
