"""Kernel: a row operand back to ragged rows, in one read and one write."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.operands import RowOperand, TokenGroups

ROWS, COLUMNS = 16, 512  # as in `unpad`


@triton.jit
def dequantize_rows_kernel(
    row_data, row_scale,  # e4m3 (CAPACITY, N); fp32 stored (N / 128, CAPACITY)
    token_row,  # int32 (M,)
    out,  # (M, N) contiguous
    M, N, CAPACITY,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program fills ROWS rows x COLUMNS columns; rows of no group get zeros."""
    column_blocks = tl.cdiv(N, COLUMNS)
    rows = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    source = tl.load(token_row + rows, mask=rows < M, other=-1)
    live = inside & (source >= 0)[:, None]
    codes = tl.load(row_data + source[:, None].to(tl.int64) * N + columns[None, :], mask=live, other=0.0)
    scale = tl.load(
        row_scale + (columns // 128)[None, :].to(tl.int64) * CAPACITY + source[:, None], mask=live, other=0.0
    )
    tl.store(out + rows[:, None].to(tl.int64) * N + columns[None, :], codes.to(tl.float32) * scale, mask=inside)


def launch_dequantize_rows(rows: RowOperand, groups: TokenGroups, out: Tensor) -> None:
    """`out[m] = rows[token_row[m]]` in its dtype, zeros for rows of no group."""
    num_rows, num_columns = out.shape
    blocks = ceil_div(num_rows, ROWS) * ceil_div(num_columns, COLUMNS)
    if blocks == 0:
        return
    launch(
        dequantize_rows_kernel, blocks,
        rows.data, rows.stored_scale, groups.token_row, out, num_rows, num_columns, groups.capacity,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
