"""Not FP8: the grouped GEMMs in BF16 that AUTO takes where FP8 cannot run or would be slower."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.gemm.emulated import zero_rows_of_no_group


def m_grouped_bf16(lhs: Tensor, rhs: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Forward and dgrad on ragged rows: `lhs` `(M, K)` times `rhs` `(E, K, N)`, zeros from row `ends[-1]` on.

    Args:
        lhs, rhs: any float dtype; converted to BF16.
        ends: int32 `(E,)`.

    Returns:
        `(M, N)` in `out_dtype`.
    """
    if lhs.shape[0] == 0:
        return lhs.new_zeros((0, rhs.shape[2]), dtype=out_dtype)
    with torch.autocast(lhs.device.type, enabled=False):
        out = F.grouped_mm(_bf16(lhs), rhs.bfloat16(), offs=ends)
    return zero_rows_of_no_group(out, ends).to(out_dtype)


def k_grouped_bf16(lhs: Tensor, rhs: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Wgrad: `lhs` `(M, N)` and `rhs` `(M, K)` contracted over each group's rows, `(E, N, K)` in `out_dtype`."""
    if lhs.shape[0] == 0:
        return lhs.new_zeros((ends.shape[0], lhs.shape[1], rhs.shape[1]), dtype=out_dtype)
    with torch.autocast(lhs.device.type, enabled=False):
        return F.grouped_mm(_bf16(lhs).t(), _bf16(rhs), offs=ends).to(out_dtype)


def _bf16(x: Tensor) -> Tensor:
    """BF16 with the unit stride that `grouped_mm` needs: expanded and transposed gradients have none."""
    return x.bfloat16().contiguous()
