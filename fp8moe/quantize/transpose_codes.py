"""The codes of a weight, transposed: what forward takes of what dgrad takes, and the other way round."""

from torch import Tensor

import torch


def transpose_codes(codes: Tensor) -> Tensor:
    """`(E, N, K)` to `(E, K, N)`, contiguous, byte by byte."""
    return codes.view(torch.uint8).transpose(1, 2).contiguous().view(codes.dtype)
