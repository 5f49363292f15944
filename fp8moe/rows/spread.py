"""The rows that the experts compute on, copied from the tokens: the transpose of `combine`."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.torch_op import torch_op


def spread_by_index(tokens: Tensor, choice_row: Tensor, dtype: torch.dtype) -> Tensor:
    """`spread` in plain PyTorch: the definition."""
    rows = _empty_rows(tokens, choice_row, dtype)
    token, _ = torch.where(choice_row >= 0)
    rows[choice_row[choice_row >= 0].long()] = tokens[token].to(dtype)
    return rows


def _empty_rows(tokens: Tensor, choice_row: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty((choice_row.numel(), tokens.shape[1]), dtype=dtype)


@torch_op(fake=_empty_rows)
def spread(tokens: Tensor, choice_row: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy each token to the rows of its choices.

    Args:
        tokens: bf16, fp16 or fp32 `(T, H)`, any strides.
        choice_row: int32 `(T, k)`: the row of each choice, as in `Routing`, or -1.
        dtype: of the result.

    Returns:
        `(T * k, H)`, contiguous; rows of no choice are unspecified.
    """
    if runs_triton(tokens.device):
        from fp8moe.kernels.spread import launch_spread

        rows = _empty_rows(tokens, choice_row, dtype)
        launch_spread(tokens.contiguous(), choice_row.contiguous(), rows)
        return rows
    return spread_by_index(tokens, choice_row, dtype)
