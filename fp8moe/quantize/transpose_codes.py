"""The codes of a weight, transposed: what forward takes of what dgrad takes, and the other way round."""

import torch
from torch import Tensor

from fp8moe.devices import runs_triton


def transpose_codes(codes: Tensor) -> Tensor:
    """Of one operand of a weight the other's codes: a block has the same scale in both. Not an operator itself.

    Args:
        codes: e4m3 `(E, N, K)`, contiguous, `N` and `K` multiples of 128.

    Returns:
        `(E, K, N)`, contiguous.
    """
    num_experts, n, k = codes.shape
    transposed = torch.empty((num_experts, k, n), dtype=codes.dtype, device=codes.device)
    if runs_triton(codes.device):
        from fp8moe.kernels.transpose_codes import launch_transpose_codes

        launch_transpose_codes(codes, transposed)
    else:
        transposed.view(torch.uint8).copy_(codes.view(torch.uint8).transpose(1, 2))
    return transposed
