"""Row operands back to high precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.devices import runs_triton_fp8
from fp8moe.operands import (
    RowOperand,
    TokenGroups,
)
from fp8moe.quantize import reference
from fp8moe.torch_op import torch_op


def dequantize_rows(rows: RowOperand, groups: TokenGroups, dtype: torch.dtype) -> Tensor:
    """A row operand `(R, D)` back to ragged rows `(M, D)`, with all its features; zeros for rows of no group."""
    return _dequantize_rows(*rows.tensors, groups.num_rows, groups.tensors, dtype)


def _empty_ragged_rows(
    row_data: Tensor, row_scale: Tensor, num_rows: int, plan: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    return row_data.new_empty((num_rows, row_data.shape[1]), dtype=dtype)


@torch_op(fake=_empty_ragged_rows)
def _dequantize_rows(
    row_data: Tensor, row_scale: Tensor, num_rows: int, plan: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    rows, groups = RowOperand(row_data, row_scale), TokenGroups(num_rows, *plan)
    out = _empty_ragged_rows(row_data, row_scale, num_rows, plan, dtype)
    if runs_triton_fp8(row_data.device):
        from fp8moe.kernels.dequantize import launch_dequantize_rows

        launch_dequantize_rows(rows, groups, out)
        return out
    padding = (groups.token_row < 0)[:, None]
    return out.copy_(reference.dequantize_rows(rows)[groups.token_row.clamp(min=0)].masked_fill(padding, 0.0))
