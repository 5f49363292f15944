"""Kernel: sums of one number a row that come in parts, for each choice or each ragged row."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch

RESULTS = 256  # of a program


@triton.jit
def part_sums_kernel(
    parts,  # fp32 (PARTS, ROWS)
    choice_row,  # int32 (M,), or None: each row by itself
    ends,  # int32 (E,), where there is no `choice_row`
    sums,  # fp32 (M / CHOICES, CHOICES), choices contiguous
    stride_sums, M, ROWS, PARTS, E,
    CHOICES: tl.constexpr, RESULTS: tl.constexpr,
):  # fmt: skip
    """`sums[m] = parts[0, row] + parts[1, row] + ...`, zero for choices of no row and rows of no group."""
    index = tl.program_id(0) * RESULTS + tl.arange(0, RESULTS)
    if choice_row is None:
        row = tl.where(index < tl.load(ends + E - 1), index, -1)
    else:
        row = tl.load(choice_row + index, mask=index < M, other=-1)
    total = tl.zeros((RESULTS,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + tl.cast(part, tl.int64) * ROWS + row, mask=row >= 0, other=0.0)
    place = (index // CHOICES).to(tl.int64) * stride_sums + index % CHOICES
    tl.store(sums + place, total, mask=index < M)


def launch_part_sums(parts: Tensor, choice_row: Tensor | None, ends: Tensor | None, sums: Tensor) -> None:
    """Contiguous tensors but `sums`, as in the kernel; one of `choice_row` and `ends` is given."""
    num_parts, num_rows = parts.shape
    choices = 1 if choice_row is None else choice_row.shape[1]
    blocks = ceil_div(sums.numel(), RESULTS)
    if blocks > 0:
        num_experts = 0 if ends is None else ends.shape[0]
        launch(
            part_sums_kernel, blocks, parts, choice_row, ends, sums,
            sums.stride(0), sums.numel(), num_rows, num_parts, num_experts, CHOICES=choices, RESULTS=RESULTS,
        )  # fmt: skip
