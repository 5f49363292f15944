"""Kernel: whether one or two tensors hold what is not finite, in one launch."""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import Variant, ceil_div, tile_of

ELEMENTS = 4096  # of a program's tile where columns lie next to each other: enough bytes on their way at once
APART = 1024  # where each element is a sector of memory of its own


@triton.jit
def note(
    x, stride_row, stride_column, first, when, block, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write `when` to `first` if that is zero, and one of ROWS rows of `x` holds what is not finite."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
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
    x,  # (rows, x_columns)
    y,  # (rows, y_columns), or None
    first,  # int64 (1,); (2,) with `y`
    x_row, x_column, y_row, y_column, when, num_rows, x_columns, y_columns, x_blocks,
    X_ROWS: tl.constexpr, X_COLUMNS: tl.constexpr, Y_ROWS: tl.constexpr, Y_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program looks at some rows: the first `x_blocks` at X_ROWS of `x`, the others at Y_ROWS of `y`."""
    block = tl.program_id(0)
    if y is None:  # noqa: SIM114 (a constant, which decides what is compiled)
        note(x, x_row, x_column, first, when, block, num_rows, x_columns, X_ROWS, X_COLUMNS)
    elif block < x_blocks:
        note(x, x_row, x_column, first, when, block, num_rows, x_columns, X_ROWS, X_COLUMNS)
    else:
        note(y, y_row, y_column, first + 1, when, block - x_blocks, num_rows, y_columns, Y_ROWS, Y_COLUMNS)


def launch_note_not_finite(
    x: Tensor, x_every: int, y: Tensor | None, y_every: int, first: Tensor, when: int
) -> None:  # fmt: skip
    """Look at each `x_every`-th column of `x`, and each `y_every`-th of `y`, which has its shape, and write `when` to
    `first[0]` and `first[1]`, where they are zero, if there is NaN or infinity."""
    num_rows, num_columns = x.shape
    if not num_rows or not num_columns:
        return
    x_columns, y_columns = ceil_div(num_columns, x_every), ceil_div(num_columns, y_every)
    variant, x_rows, y_rows = _variant(x_columns, x_every == 1, y_columns, y_every == 1)
    x_row, x_column = x.stride()
    y_row, y_column = (0, 0) if y is None else y.stride()
    x_blocks = ceil_div(num_rows, x_rows)
    variant.launch(
        x_blocks if y is None else x_blocks + ceil_div(num_rows, y_rows), x, y, first,
        x_row, x_column * x_every, y_row, y_column * y_every, when, num_rows, x_columns, y_columns, x_blocks,
    )  # fmt: skip


@cache
def _variant(x_columns: int, x_is_whole: bool, y_columns: int, y_is_whole: bool) -> tuple[Variant, int, int]:
    """And how many rows of `x` and of `y` a program looks at."""
    x_rows, x_width = tile_of(x_columns, ELEMENTS if x_is_whole else APART)
    y_rows, y_width = tile_of(y_columns, ELEMENTS if y_is_whole else APART)
    variant = Variant(
        note_not_finite_kernel, X_ROWS=x_rows, X_COLUMNS=x_width, Y_ROWS=y_rows, Y_COLUMNS=y_width, num_warps=4
    )
    return variant, x_rows, y_rows
