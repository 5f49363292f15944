"""The sum of each token's rows: the experts' outputs in forward, the gradients of the token's copies in backward."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.torch_op import returns_nothing, torch_op


def combine_by_loop(rows: Tensor, choice_row: Tensor, dtype: torch.dtype) -> Tensor:
    """`combine` in plain PyTorch: the definition."""
    total = rows.new_zeros((choice_row.shape[0], rows.shape[1]), dtype=torch.float32)
    for row in choice_row.unbind(1) if len(rows) else ():
        total += torch.where((row < 0)[:, None], 0.0, rows[row.clamp(min=0)].float())
    return total.to(dtype)


def _empty_sums(rows: Tensor, choice_row: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((choice_row.shape[0], rows.shape[1]), dtype=dtype, device=rows.device)


@torch_op(fake=_empty_sums)
def combine(rows: Tensor, choice_row: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each token's choices, in fp32 and in the order of the choices, so that bits repeat.

    Args:
        rows: bf16, fp16 or fp32 `(rows, H)`, ragged or padded, any strides; rows of no choice are never read into
            a result.
        choice_row: int32 `(T, k)`: the row of each choice, as in `Routing`; -1 adds nothing.
        dtype: of the result.

    Returns:
        `(T, H)`, zeros for a token without rows.
    """
    if runs_triton(rows.device):
        out = _empty_sums(rows, choice_row, dtype)
        _launch(rows, choice_row, out)
        return out
    return combine_by_loop(rows, choice_row, dtype)


@torch_op(fake=returns_nothing, mutates_args=("out",))
def combine_into(out: Tensor, rows: Tensor, choice_row: Tensor) -> None:
    """`combine` into `out` `(T, H)`, features contiguous, in its dtype."""
    if runs_triton(rows.device):
        _launch(rows, choice_row, out)
        torch.autograd.graph.increment_version(out)
    else:
        out.copy_(combine_by_loop(rows, choice_row, out.dtype))


def _launch(rows: Tensor, choice_row: Tensor, out: Tensor) -> None:
    from fp8moe.kernels.combine import launch_combine

    launch_combine(rows if rows.stride(1) == 1 else rows.contiguous(), choice_row.contiguous(), out)
