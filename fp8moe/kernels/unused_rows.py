"""Kernel: zeros past the last group. It touches nothing else: a masked fill of the output costs a third of a GEMM."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch

ROWS, COLUMNS = 32, 1024


@triton.jit
def zero_unused_rows_kernel(
    out,  # (M, N) contiguous
    ends,  # int32 (E,)
    M, N, E,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program zeroes what is unused of ROWS rows x COLUMNS columns: mostly nothing."""
    column_blocks = tl.cdiv(N, COLUMNS)
    row_start = tl.program_id(0) // column_blocks * ROWS
    used = tl.load(ends + E - 1)
    if row_start + ROWS <= used:
        return
    rows = row_start + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    unused = ((rows >= used) & (rows < M))[:, None] & (columns < N)[None, :]
    zeros = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    tl.store(out + rows[:, None].to(tl.int64) * N + columns[None, :], zeros, mask=unused)


def launch_zero_unused_rows(out: Tensor, ends: Tensor) -> None:
    """Zero `out` `(M, N)` from row `ends[-1]` on."""
    num_rows, num_columns = out.shape
    blocks = ceil_div(num_rows, ROWS) * ceil_div(num_columns, COLUMNS)
    if blocks == 0:
        return
    launch(
        zero_unused_rows_kernel,
        blocks,
        out,
        ends,
        num_rows,
        num_columns,
        ends.shape[0],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=8,
    )
