"""The sum of each token's rows: the experts' outputs in forward, the gradients of the token's copies in backward."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.torch_op import torch_op


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
        rows: bf16, fp16 or fp32 `(rows, H)`, ragged or padded; rows of no choice are never read into a result.
        choice_row: int32 `(T, k)`: the row of each choice, as in `Routing`; -1 adds nothing.
        dtype: of the result.

    Returns:
        `(T, H)`, zeros for a token without rows.
    """
    if runs_triton(rows.device):
        from fp8moe.kernels.combine import launch_combine

        out = _empty_sums(rows, choice_row, dtype)
        launch_combine(rows.contiguous(), choice_row.contiguous(), out)
        return out
    return combine_by_loop(rows, choice_row, dtype)
