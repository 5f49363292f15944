"""Moves one number per choice, such as the router's weight, to the rows of the choices, and back."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.torch_op import torch_op


@torch_op(fake=lambda values, choice_row: values.new_empty(values.numel()))
def at_rows(values: Tensor, choice_row: Tensor) -> Tensor:
    """Give the number of each choice, such as the router's weight, to the choice's row.

    Args:
        values: `(T, k)`, any dtype.
        choice_row: int32 `(T, k)`: the row of each choice, all different and below `T * k`, or -1 for none.

    Returns:
        `(T * k,)` in the dtype of `values`; unspecified for rows of no choice.
    """
    if runs_triton(values.device):
        from fp8moe.kernels.choices import launch_scatter_choices

        row_values = values.new_empty(values.numel())
        launch_scatter_choices(values.contiguous(), choice_row.contiguous(), row_values)
        return row_values
    row_values = values.new_zeros(values.numel())
    live = choice_row >= 0
    row_values[choice_row[live].long()] = values[live]
    return row_values


@torch_op(fake=lambda row_values, choice_row: row_values.new_empty(choice_row.shape))
def at_choices(row_values: Tensor, choice_row: Tensor) -> Tensor:
    """Give the number of each row back to the choice that the row came from: the gradient of the router's weights.

    Args:
        row_values: `(rows,)`, any dtype.
        choice_row: int32 `(T, k)`: the row of each choice, -1 for none.

    Returns:
        `(T, k)` in the dtype of `row_values`; zeros for choices without a row.
    """
    if runs_triton(row_values.device):
        from fp8moe.kernels.choices import launch_gather_choices

        values = row_values.new_empty(choice_row.shape)
        launch_gather_choices(row_values.contiguous(), choice_row.contiguous(), values)
        return values
    return torch.where(choice_row < 0, 0, row_values[choice_row.clamp(min=0)])
