"""The products with a weight: from its cache, where there is one, or quantized for this product alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from fp8moe.config import KernelPreference, ScaleFormat
from fp8moe.gemm.cached import m_grouped_cached
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import RowOperand, TokenGroups
from fp8moe.quantize import quantize_weight_for_dgrad, quantize_weight_for_forward
from fp8moe.quantize.weights import Split


class ExpertWeight(NamedTuple):
    """One matrix for each expert, in high precision, and its cache."""

    parts: tuple[Tensor, ...]
    """`(E, N, K)`, any size; or several that lie side by side along `N`; one where there is a cache."""
    cache_handle: Tensor | None
    """`WeightCache.handle`."""
    split: Split = Split.WHOLE
    """Into which parts each of them is divided."""


def expert_product(
    backend: KernelPreference, rows: RowOperand, weight: ExpertWeight, groups: TokenGroups, out_dtype: torch.dtype,
    scale_format: ScaleFormat, *, for_dgrad: bool = False,
) -> Tensor:  # fmt: skip
    """`(M, N)`: each row `(R, K)` with its expert's matrix; for dgrad `(M, K)` from `(R, N)`, with it transposed.

    `N` and `K` are those of the weight, and in `rows` in whole blocks of 128. But where several parts lie side by side,
    the result too has each of them in whole blocks.
    """
    parts, split = weight.parts, weight.split
    if weight.cache_handle is not None:
        return m_grouped_cached(
            rows.tensors, parts[0], weight.cache_handle, for_dgrad, split.value, scale_format.value, backend.value,
            groups.num_rows, groups.tensors, out_dtype,
        )  # fmt: skip
    quantize_weight = quantize_weight_for_dgrad if for_dgrad else quantize_weight_for_forward
    is_one = len(parts) == 1 and split is Split.WHOLE
    num_features = parts[0].shape[2] if for_dgrad else parts[0].shape[1] if is_one else None
    operand = quantize_weight(parts, scale_format, split)
    return BACKENDS[backend].m_grouped(rows, operand, groups, out_dtype, num_features)
