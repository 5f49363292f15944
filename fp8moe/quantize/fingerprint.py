"""Whether a weight has changed, found out on the device: by a hash of some of its elements and a count of steps.

Of each block of 128 x 128 elements, 4 runs of 16 are hashed, spread over its lines and different from block to block:
1/256 of all elements. (Blocks at the edges of a weight may be smaller. Of each 4 runs are hashed as well, which may lie
in one line, or end with it.) So a write that changes `n` elements in random places is missed with probability
`(255/256)**n` (1000 elements: 2%; 5000: 3e-9), and one that changes every element of a block never is (but for a
collision of the hash, 2**-32 for each of up to 512 chunks of blocks). Steps are counted, so they are never missed.
"""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.operands import BLOCK

SECTORS = 4
"""Runs that are read of a block."""
SECTOR = 16
"""Elements of a run: 32 bytes of bf16, the least that a GPU reads from memory."""
MAX_CHUNKS = 512
"""Hashes of a weight. Every program that quantizes reads which of them have changed."""
CHUNK_BLOCKS = 32
"""The least number of blocks that share a hash."""


def num_chunks(weight: Tensor) -> int:
    """Of how many hashes the fingerprint of `weight` `(E, N, K)` consists."""
    num_experts, n, k = weight.shape
    num_blocks = num_experts * -(-n // BLOCK) * -(-k // BLOCK)
    return min(-(-num_blocks // CHUNK_BLOCKS), MAX_CHUNKS)


def find_changes(w: Tensor, step: Tensor, known: Tensor, changed: Tensor, *, force: bool) -> None:
    """Compare the fingerprint of a weight with the known one, which it then replaces.

    Args:
        w: bf16, fp16 or fp32 `(E, N, K)`, any size and strides, not empty.
        step: int32 `(1,)`: the number of optimizer steps so far.
        known: int32 `(chunks, 2)`: the hash of each chunk, and `step` at the time.
        changed: int32 `(chunks,)`: set to 1 where hash or step differ, else to 0.
        force: set all to 1.
    """
    bits = as_lines(w)
    if runs_triton(w.device):
        from fp8moe.kernels.fingerprint import launch_find_changes

        launch_find_changes(bits, step, known, changed, force=force, sectors=SECTORS, sector=SECTOR)
        return
    now = torch.stack([hash_chunks(bits, changed.numel()), step.expand_as(changed)], dim=1)
    changed.copy_((now != known).any(1) | force)
    known.copy_(now)


def as_lines(w: Tensor) -> Tensor:
    """The bits of `w`, as int16 or int32, with the dimension of the smaller stride last: `(E, lines, elements)`."""
    w = w if w.stride(2) <= w.stride(1) else w.transpose(1, 2)
    return w.view(torch.int32 if w.element_size() == 4 else torch.int16)


def hash_chunks(bits: Tensor, chunks: int) -> Tensor:
    """int32 `(chunks,)`: the hashes in plain PyTorch: the definition."""
    num_experts, lines, elements = bits.shape
    line_blocks, element_blocks = -(-lines // BLOCK), -(-elements // BLOCK)
    num_blocks = num_experts * line_blocks * element_blocks
    block = torch.arange(num_blocks, device=bits.device)[:, None]  # (blocks, 1)
    number = torch.arange(SECTORS, device=bits.device)  # (sectors,)
    within = torch.arange(SECTOR, device=bits.device)
    first_line, first_element = block // element_blocks % line_blocks * BLOCK, block % element_blocks * BLOCK
    lines_here = (lines - first_line).clamp(max=BLOCK)
    sectors_here = ((elements - first_element + SECTOR - 1) // SECTOR).clamp(max=BLOCK // SECTOR)
    line = first_line + (number * (BLOCK // SECTORS) + block * 29) % BLOCK % lines_here
    element = first_element + (block * 5 + number * 3) % (BLOCK // SECTOR) % sectors_here * SECTOR
    expert = (block // element_blocks // line_blocks).expand_as(line)
    run = element[:, :, None] + within
    values = bits[expert[:, :, None], line[:, :, None], run.clamp(max=elements - 1)].long()  # (blocks, sectors, 16)
    place = (block * SECTORS + number)[:, :, None] * SECTOR + within
    mixed = _mix((values ^ (place * 0x9E3779B1)) & 0xFFFFFFFF)
    mixed = mixed.masked_fill(run >= elements, 0).flatten(1).sum(1)  # (blocks,)
    chunk = torch.arange(num_blocks, device=bits.device) // -(-num_blocks // chunks)
    return mixed.new_zeros(chunks).index_add_(0, chunk, mixed).int()


def _mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (Appleby, 2011) on uint32, held in int64."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)
