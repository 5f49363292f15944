"""The products with a weight: from its cache, where there is one, or quantized for this product alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from fp8moe.config import KernelPreference, ScaleFormat
from fp8moe.gemm.cached import m_grouped_cached
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import RowOperand, TokenGroups
from fp8moe.quantize import quantize_weight_for_dgrad, quantize_weight_for_forward


class ExpertWeight(NamedTuple):
    """One matrix for each expert, in high precision, and its cache."""

    parts: tuple[Tensor, ...]
    """`(E, N, K)`, or several that lie side by side along `N`; one where there is a cache."""
    cache_handle: Tensor | None
    """`WeightCache.handle`."""


def expert_product(
    backend: KernelPreference, rows: RowOperand, weight: ExpertWeight, groups: TokenGroups, out_dtype: torch.dtype,
    scale_format: ScaleFormat, *, for_dgrad: bool = False,
) -> Tensor:  # fmt: skip
    """`(M, N)`: each row `(R, K)` with its expert's matrix; for dgrad `(M, K)` from `(R, N)`, with it transposed."""
    if weight.cache_handle is not None:
        return m_grouped_cached(
            rows.tensors, weight.parts[0], weight.cache_handle, for_dgrad, scale_format.value, backend.value,
            groups.num_rows, groups.tensors, out_dtype,
        )  # fmt: skip
    quantize_weight = quantize_weight_for_dgrad if for_dgrad else quantize_weight_for_forward
    return BACKENDS[backend].m_grouped(rows, quantize_weight(weight.parts, scale_format), groups, out_dtype)
