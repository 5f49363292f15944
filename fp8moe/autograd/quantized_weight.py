"""A weight's operands: from its cache, where there is one, or quantized where they are used.

Autograd functions take and save them as tensors; None stands for what no cache holds.
"""

from collections.abc import Sequence

from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import WeightOperand
from fp8moe.quantize import quantize_weight_for_dgrad, quantize_weight_for_forward
from fp8moe.quantize.weight_cache import WeightCache

Parts = Tensor | Sequence[Tensor]
"""`(E, N, K)`, or several that lie side by side along `N`."""


NOT_CACHED = (None, None, None)
"""`cached_tensors` of a weight without a cache."""


def cached_tensors(cache: WeightCache, weight: Tensor, scale_format: ScaleFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Forward data, dgrad data and the scale of both, of a detached `weight` `(E, N, K)`.

    They are inputs of an autograd function, not made within it: a compiler may reuse the memory of what an operator
    returns.
    """
    forward_weight, dgrad_weight = cache.operands(weight, scale_format)
    return forward_weight.data, dgrad_weight.data, forward_weight.scale


def forward_operand(
    parts: Parts, data: Tensor | None, scale: Tensor | None, scale_format: ScaleFormat
) -> WeightOperand:
    """Of cached `data` and `scale`, or of `parts`."""
    if data is None or scale is None:
        return quantize_weight_for_forward(parts, scale_format)
    return WeightOperand(data, scale)


def dgrad_operand(parts: Parts, data: Tensor | None, scale: Tensor | None, scale_format: ScaleFormat) -> WeightOperand:
    """Of cached `data` and `scale`, or of `parts`."""
    if data is None or scale is None:
        return quantize_weight_for_dgrad(parts, scale_format)
    return WeightOperand(data, scale.transpose(1, 2))
