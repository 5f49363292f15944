"""Kernel: whether one or two tensors hold what is not finite, in one launch."""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import Variant, ceil_div, tile_of

ELEMENTS = 1024  # of a program's tile


@triton.jit
def note(
    x, stride_row, stride_column, first, when, block, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write `when` to `first` if that is zero, and one of ROWS rows of `x` holds what is not finite."""
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_first = tl.load(first) == 0
    for start in range(0, num_columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        places = row[:, None] * stride_row + column[None, :] * stride_column
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        is_finite = tl.abs(values) < float("inf")
        # Whoever finds something writes the same: there is nothing to reduce, and nothing to write in a sound run.
        tl.store(first + tl.zeros((ROWS, COLUMNS), tl.int32), when, mask=(is_finite == 0) & is_first)


@triton.jit(do_not_specialize=["when", "num_rows", "x_blocks"])
def note_not_finite_kernel(
    x,  # (rows, columns)
    y,  # as `x`, or None
    first,  # int64 (1,); (2,) with `y`
    x_row, x_column, y_row, y_column, when, num_rows, num_columns, x_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program looks at ROWS rows: the first `x_blocks` at those of `x`, the others at those of `y`."""
    block = tl.program_id(0)
    if y is None:  # noqa: SIM114 (a constant, which decides what is compiled)
        note(x, x_row, x_column, first, when, block, num_rows, num_columns, ROWS, COLUMNS)
    elif block < x_blocks:
        note(x, x_row, x_column, first, when, block, num_rows, num_columns, ROWS, COLUMNS)
    else:
        note(y, y_row, y_column, first + 1, when, block - x_blocks, num_rows, num_columns, ROWS, COLUMNS)


def launch_note_not_finite(x: Tensor, y: Tensor | None, every: int, first: Tensor, when: int) -> None:
    """Look at each `every`-th column of `x` and of `y`, which has its shape, and write `when` to `first[0]` and
    `first[1]`, where they are zero, if there is NaN or infinity."""
    num_rows, num_columns = x.shape
    num_columns = ceil_div(num_columns, every)
    if not num_rows or not num_columns:
        return
    variant, rows = _variant(num_columns)
    x_row, x_column = x.stride()
    y_row, y_column = (0, 0) if y is None else y.stride()
    blocks = ceil_div(num_rows, rows)
    variant.launch(
        blocks if y is None else 2 * blocks, x, y, first, x_row, x_column * every, y_row, y_column * every, when,
        num_rows, num_columns, blocks,
    )  # fmt: skip


@cache
def _variant(num_columns: int) -> tuple[Variant, int]:
    rows, columns = tile_of(num_columns, ELEMENTS)
    return Variant(note_not_finite_kernel, ROWS=rows, COLUMNS=columns, num_warps=4), rows
