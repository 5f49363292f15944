"""Sums of one number a row that come in parts, as the gradient of a row's weight from each block of features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.torch_op import returns_nothing, torch_op


def _in_order(parts: Tensor) -> Tensor:
    total = parts.new_zeros(parts.shape[1])
    for part in parts.unbind(0):
        total += part
    return total


@torch_op(fake=lambda parts, choice_row: parts.new_empty(choice_row.shape))
def sums_at_choices(parts: Tensor, choice_row: Tensor) -> Tensor:
    """The sum of each choice's row.

    Args:
        parts: fp32 `(P, rows)`, contiguous; rows of no choice are never read into a result.
        choice_row: int32 `(T, k)`: the row of each choice, as in `Routing`.

    Returns:
        fp32 `(T, k)`, added up in the order of the parts, so that bits repeat; zeros for choices without a row.
    """
    if runs_triton(parts.device):
        sums = parts.new_empty(choice_row.shape)
        _launch(parts, choice_row, sums)
        return sums
    return sums_at_choices_by_index(parts, choice_row)


@torch_op(fake=returns_nothing, mutates_args=("sums",))
def sums_at_choices_into(sums: Tensor, parts: Tensor, choice_row: Tensor) -> None:
    """`sums_at_choices` into fp32 `sums` `(T, k)`, choices contiguous."""
    if runs_triton(parts.device):
        _launch(parts, choice_row, sums)
        torch.autograd.graph.increment_version(sums)
    else:
        sums.copy_(sums_at_choices_by_index(parts, choice_row))


def sums_at_choices_by_index(parts: Tensor, choice_row: Tensor) -> Tensor:
    """`sums_at_choices` in plain PyTorch: the definition."""
    return F.pad(_in_order(parts), (0, 1))[choice_row.long()]  # -1 is the last row, of zeros


def _launch(parts: Tensor, choice_row: Tensor, sums: Tensor) -> None:
    from fp8moe.kernels.part_sums import launch_part_sums

    launch_part_sums(parts, choice_row.contiguous(), None, sums)


@torch_op(fake=lambda parts, ends: parts.new_empty(parts.shape[1]))
def sums_at_rows(parts: Tensor, ends: Tensor) -> Tensor:
    """The sum of each ragged row.

    Args:
        parts: fp32 `(P, M)`, contiguous; rows of no group are never read into a result.
        ends: int32 `(E,)`, of `TokenGroups`.

    Returns:
        fp32 `(M,)`, added up in the order of the parts; zeros for rows of no group.
    """
    if runs_triton(parts.device):
        from fp8moe.kernels.part_sums import launch_part_sums

        sums = parts.new_empty(parts.shape[1])
        launch_part_sums(parts, None, ends, sums)
        return sums
    rows = torch.arange(parts.shape[1], device=parts.device)
    return torch.where(rows < ends[-1], _in_order(parts), 0.0)
