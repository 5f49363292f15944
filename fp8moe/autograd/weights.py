"""The products with a weight: from its cache, where there is one, or quantized for this product alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.config import KernelPreference, ScaleFormat
from fp8moe.gemm.cached import m_grouped_cached
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import RowOperand, TokenGroups
from fp8moe.quantize import quantize_weight_for_dgrad, quantize_weight_for_forward


def forward_product(
    backend: KernelPreference, rows: RowOperand, weight: Sequence[Tensor], cache_handle: Tensor | None,
    groups: TokenGroups, out_dtype: torch.dtype, scale_format: ScaleFormat,
) -> Tensor:  # fmt: skip
    """`(M, N)`: each row `(R, K)` with its expert's matrix.

    Args:
        weight: `(E, N, K)`, or several that lie side by side along `N`; one where there is a cache.
        cache_handle: `WeightCache.handle`, or None.
    """
    if cache_handle is not None:
        return m_grouped_cached(
            backend, rows, weight[0], cache_handle, groups, out_dtype, scale_format, for_dgrad=False
        )  # fmt: skip
    return BACKENDS[backend].m_grouped(rows, quantize_weight_for_forward(weight, scale_format), groups, out_dtype)


def dgrad_product(
    backend: KernelPreference, rows: RowOperand, weight: Sequence[Tensor], cache_handle: Tensor | None,
    groups: TokenGroups, out_dtype: torch.dtype, scale_format: ScaleFormat,
) -> Tensor:  # fmt: skip
    """`(M, K)`: each row `(R, N)` with its expert's matrix, transposed; arguments as in `forward_product`."""
    if cache_handle is not None:
        return m_grouped_cached(backend, rows, weight[0], cache_handle, groups, out_dtype, scale_format, for_dgrad=True)
    return BACKENDS[backend].m_grouped(rows, quantize_weight_for_dgrad(weight, scale_format), groups, out_dtype)
