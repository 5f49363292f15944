"""Kernels: one number a choice to the rows of the choices, and back."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch

CHOICES = 1024  # of a program


@triton.jit
def scatter_choices_kernel(
    values,  # (M,) any dtype
    choice_row,  # int32 (M,)
    row_values,  # (rows,) of that dtype
    M,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """`row_values[choice_row[c]] = values[c]`: rows of no choice are left as they are."""
    choice = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    row = tl.load(choice_row + choice, mask=choice < M, other=-1)
    tl.store(row_values + row, tl.load(values + choice, mask=choice < M), mask=row >= 0)


@triton.jit
def gather_choices_kernel(
    row_values,  # (rows,) any dtype
    choice_row,  # int32 (M,)
    values,  # (M,) of that dtype
    M,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """`values[c] = row_values[choice_row[c]]`, zeros for choices of no row."""
    choice = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    row = tl.load(choice_row + choice, mask=choice < M, other=-1)
    tl.store(values + choice, tl.load(row_values + row, mask=row >= 0, other=0), mask=choice < M)


def launch_scatter_choices(values: Tensor, choice_row: Tensor, row_values: Tensor) -> None:
    """Contiguous tensors, as in the kernel."""
    blocks = ceil_div(values.numel(), CHOICES)
    if blocks > 0:
        launch(scatter_choices_kernel, blocks, values, choice_row, row_values, values.numel(), CHOICES=CHOICES)


def launch_gather_choices(row_values: Tensor, choice_row: Tensor, values: Tensor) -> None:
    """Contiguous tensors, as in the kernel."""
    blocks = ceil_div(values.numel(), CHOICES)
    if blocks > 0:
        launch(gather_choices_kernel, blocks, row_values, choice_row, values, values.numel(), CHOICES=CHOICES)
