"""Kernel: gather the ragged rows of a padded matrix, with zeros for rows of no group, in one read and one write."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch

ROWS, COLUMNS = 16, 512


@triton.jit
def unpad_kernel(
    padded,  # (R, PADDED_N) contiguous
    token_row,  # int32 (M,)
    out,  # (M, N) contiguous
    M, N, PADDED_N,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program copies ROWS rows x COLUMNS columns."""
    column_blocks = tl.cdiv(N, COLUMNS)
    rows = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    source = tl.load(token_row + rows, mask=rows < M, other=-1)
    values = tl.load(
        padded + source[:, None].to(tl.int64) * PADDED_N + columns[None, :],
        mask=inside & (source >= 0)[:, None], other=0.0,
    )  # fmt: skip
    tl.store(out + rows[:, None].to(tl.int64) * N + columns[None, :], values.to(tl.float32), mask=inside)


def launch_unpad(padded: Tensor, token_row: Tensor, out: Tensor) -> None:
    """`out[m] = padded[token_row[m]]`, or zeros where that is -1; the first columns, as many as `out` has."""
    num_rows, num_columns = out.shape
    blocks = ceil_div(num_rows, ROWS) * ceil_div(num_columns, COLUMNS)
    if blocks == 0:
        return
    launch(
        unpad_kernel, blocks,
        padded, token_row, out, num_rows, num_columns, padded.shape[1],
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
