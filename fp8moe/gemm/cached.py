"""M-grouped GEMMs with weights whose operands a `WeightSource` holds: a `WeightCache`, or what FSDP gathered.

The source is hidden behind the operator, which takes the weight itself: its result depends on the values of the weight
alone, whatever a cache holds. So compilers may move the operator, autograd saves the weight (and refuses a backward
through a weight that it knows was written), and several forwards may come before a backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.config import KernelPreference, ScaleFormat
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import RowOperand, TokenGroups
from fp8moe.quantize.weight_source import source_of
from fp8moe.quantize.weights import Split
from fp8moe.torch_op import torch_op


def _empty_product(
    lhs: Sequence[Tensor], w: Tensor, handle: Tensor, for_dgrad: bool, split: str, scale_format: str,
    backend: str, num_rows: int, plan: Sequence[Tensor], num_features: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return lhs[0].new_empty((num_rows, num_features), dtype=out_dtype)


@torch_op(fake=_empty_product)
def m_grouped_cached(
    lhs: Sequence[Tensor], w: Tensor, handle: Tensor, for_dgrad: bool, split: str, scale_format: str,
    backend: str, num_rows: int, plan: Sequence[Tensor], num_features: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`GroupedGemm.m_grouped` of a `backend` with the operand of `w` that its source holds.

    Args:
        lhs: the tensors of a `RowOperand` `(R, K)`, for dgrad `(R, N)`.
        w: the weight `(E, N, K)`, or the codes that stand for it (`GatheredWeight.codes`).
        handle: `WeightSource.handle` of `w`; for dgrad, of `handle_after_use`.
        for_dgrad: whether to contract `N`.
        split, scale_format, backend: the values of a `Split`, a `ScaleFormat` and a `KernelPreference`.
        num_rows, plan: of `TokenGroups`.
        num_features: `N`, for dgrad `K`, of the result.

    Returns:
        `(M, N)`, for dgrad `(M, K)`, in `out_dtype`.
    """
    source, since = source_of(handle)
    weight = source.operand(w, ScaleFormat(scale_format), for_dgrad=for_dgrad, since=since, split=Split(split))
    return BACKENDS[KernelPreference(backend)].m_grouped(
        RowOperand(*lhs), weight, TokenGroups(num_rows, *plan), out_dtype, num_features
    )
