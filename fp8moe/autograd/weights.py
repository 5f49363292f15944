"""The products with a weight: with the operands that it has already, in a cache or because FSDP gathered them, or
quantized for this product, or for both at once.

Backward takes a weight in another orientation than forward. By default it quantizes the weight again, so that nothing
is kept in between. With `FP8Config.keep_quantized_weights` forward makes both orientations from one read, and keeps the
one for backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fp8moe.config import KernelPreference, ScaleFormat
from fp8moe.gemm.cached import m_grouped_cached
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import RowOperand, TokenGroups, WeightOperand
from fp8moe.quantize import quantize_weight_for_both, quantize_weight_for_dgrad, quantize_weight_for_forward
from fp8moe.quantize.weights import Split


class KeptWeight(NamedTuple):
    """The dgrad operand of a weight, as autograd saves it from forward to backward; two Nones if it is not kept."""

    data: Tensor | None = None
    """e4m3 `(E, K, N)`."""
    scale: Tensor | None = None
    """fp32 `(E, N/128, K/128)`, contiguous."""

    @classmethod
    def of(cls, operand: WeightOperand) -> "KeptWeight":
        """To keep `operand`."""
        return cls(operand.data, operand.scale.transpose(1, 2))

    @property
    def operand(self) -> WeightOperand | None:
        """What was kept."""
        if self.data is None or self.scale is None:
            return None
        return WeightOperand(self.data, self.scale.transpose(1, 2))


class MadeAhead(NamedTuple):
    """Of a weight, ahead of its product in forward."""

    operand: WeightOperand
    kept: KeptWeight


class ExpertWeight(NamedTuple):
    """One matrix for each expert, in high precision, and what there is of it in FP8."""

    parts: tuple[Tensor, ...]
    """`(E, N, K)`, any size; or several that lie side by side along `N`. Where there is a
    `WeightSource`, it knows of all, and the first stands for them."""
    handle: Tensor | None
    """Of the `WeightSource` that has its operands, if there is one."""
    split: Split = Split.WHOLE
    """Into which parts each of them is divided."""
    kept: KeptWeight = KeptWeight()
    """In backward: what forward kept."""
    made: MadeAhead | None = None
    """In forward: what `made_ahead` made of it."""

    def made_ahead(self, scale_format: ScaleFormat, *, keep: bool) -> MadeAhead | None:
        """What forward will need of a weight that has no `WeightSource`; and, if `keep`, backward too."""
        if self.handle is not None:
            return None
        if not keep:
            return MadeAhead(quantize_weight_for_forward(self.parts, scale_format, self.split), KeptWeight())
        operand, for_dgrad = quantize_weight_for_both(self.parts, scale_format, self.split)
        return MadeAhead(operand, KeptWeight.of(for_dgrad))


def expert_product(
    backend: KernelPreference, take_rows: Callable[[], RowOperand], weight: ExpertWeight, groups: TokenGroups,
    num_features: int, out_dtype: torch.dtype, scale_format: ScaleFormat, *, for_dgrad: bool = False,
) -> Tensor:  # fmt: skip
    """`(M, N)`: each row `(R, K)` with its expert's matrix; for dgrad `(M, K)` from `(R, N)`, with it transposed.

    The rows are taken when the weight is ready: until then they may be on their way. In them the contracted features
    lie in whole blocks of 128, and so does each part of a weight. `num_features` is how many of the columns that this
    makes the result has.
    """
    parts, split = weight.parts, weight.split
    if weight.handle is not None:
        return m_grouped_cached(
            take_rows().tensors, parts[0], weight.handle, for_dgrad, split.value, scale_format.value,
            backend.value, groups.num_rows, groups.tensors, num_features, out_dtype,
        )  # fmt: skip
    operand = weight.kept.operand if for_dgrad else None
    if operand is None:
        quantize_weight = quantize_weight_for_dgrad if for_dgrad else quantize_weight_for_forward
        operand = quantize_weight(parts, scale_format, split)
    return BACKENDS[backend].m_grouped(take_rows(), operand, groups, out_dtype, num_features)


def forward_product(
    backend: KernelPreference, take_rows: Callable[[], RowOperand], weight: ExpertWeight, groups: TokenGroups,
    num_features: int, out_dtype: torch.dtype, scale_format: ScaleFormat, *, keep: bool,
) -> tuple[Tensor, KeptWeight]:  # fmt: skip
    """`expert_product` of forward; and, if `keep`, what backward will need of a weight that has no `WeightSource`."""
    made = weight.made or weight.made_ahead(scale_format, keep=keep)
    if made is None:
        return expert_product(backend, take_rows, weight, groups, num_features, out_dtype, scale_format), KeptWeight()
    return BACKENDS[backend].m_grouped(take_rows(), made.operand, groups, out_dtype, num_features), made.kept
