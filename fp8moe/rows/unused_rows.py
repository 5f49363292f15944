"""Rows of no group, past `offs[-1]`: zeros by contract, but no grouped GEMM of PyTorch writes them."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton


def zero_unused_rows_(out: Tensor, ends: Tensor) -> Tensor:
    """Write zeros to `out` from row `ends[-1]` on, in place, without reading the device on the host.

    Args:
        out: `(M, N)` contiguous.
        ends: int32 `(E,)`.

    Returns:
        `out`.
    """
    if runs_triton(out.device):
        from fp8moe.kernels.unused_rows import launch_zero_unused_rows

        launch_zero_unused_rows(out, ends)
        return out
    rows = torch.arange(out.shape[0], device=out.device)
    return out.masked_fill_((rows >= ends[-1])[:, None], 0.0)
