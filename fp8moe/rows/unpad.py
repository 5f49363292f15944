"""From padded rows back to the caller's ragged rows, for GEMMs that can only write padded ones."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.operands import TokenGroups


def unpad(padded: Tensor, groups: TokenGroups, out: Tensor) -> Tensor:
    """Write row `groups.token_row[m]` of `padded` `(R, N)` to row `m` of `out` `(M, N)`, zeros to rows of no group.

    `out` may have fewer columns, the first ones. Both are contiguous; values are converted to the dtype of `out`.
    Returns `out`.
    """
    if runs_triton(padded.device):
        from fp8moe.kernels.unpad import launch_unpad

        launch_unpad(padded, groups.token_row, out)
        return out
    rows = groups.token_row
    return out.copy_(torch.where((rows < 0)[:, None], 0.0, padded[rows.clamp(min=0), : out.shape[1]]))
