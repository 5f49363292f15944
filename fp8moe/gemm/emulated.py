"""The reference backend: dequantize the FP8 operands and multiply in fp32. Runs anywhere PyTorch does."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.gemm.base import Gemm, Missing, empty_m_grouped
from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import reference
from fp8moe.rows.unused_rows import zero_unused_rows_
from fp8moe.torch_op import returns_nothing, torch_op


class Emulated:
    """`GroupedGemm` on `torch.nn.functional.grouped_mm` in fp32."""

    token_layout = TokenLayout.SIDE_BY_SIDE

    def missing(self, gemm: Gemm, device: torch.device) -> tuple[Missing, ...]:
        return ()

    def m_grouped(self, lhs: RowOperand, rhs: WeightOperand, groups: TokenGroups, out_dtype: torch.dtype) -> Tensor:
        plan = groups.tensors
        return _emulated_m_grouped(*lhs.tensors, rhs.data, rhs.scale, groups.num_rows, plan, out_dtype)

    def k_grouped(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, out_dtype: torch.dtype) -> Tensor:
        plan = groups.tensors
        return _emulated_k_grouped(*lhs.tensors, *rhs.tensors, groups.num_rows, plan, out_dtype)

    def k_grouped_add(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, into: Tensor) -> None:
        plan = groups.tensors
        _emulated_k_grouped_add(*lhs.tensors, *rhs.tensors, groups.num_rows, plan, into)


@torch_op(fake=empty_m_grouped)
def _emulated_m_grouped(
    lhs_data: Tensor, lhs_scale: Tensor, rhs_data: Tensor, rhs_scale: Tensor,
    num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    groups = TokenGroups(num_rows, *plan)
    if num_rows == 0:
        return lhs_data.new_empty((0, rhs_data.shape[1]), dtype=out_dtype)
    # Padding is dropped before the product rather than after it: fewer flops, and the rows come out ragged at once.
    padded = reference.dequantize_rows(RowOperand(lhs_data, lhs_scale))  # (R, K)
    ragged = padded[groups.token_row.clamp(min=0)]  # (M, K)
    weight = reference.dequantize_weight(WeightOperand(rhs_data, rhs_scale))  # (E, N, K)
    with torch.autocast(lhs_data.device.type, enabled=False):
        out = F.grouped_mm(ragged, weight.transpose(-2, -1), offs=groups.ends)
    return zero_unused_rows_(out, groups.ends).to(out_dtype)


def _fake_k_grouped(
    lhs_data: Tensor, lhs_scale: Tensor, rhs_data: Tensor, rhs_scale: Tensor,
    num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    num_experts = TokenGroups(num_rows, *plan).num_groups
    return lhs_data.new_empty((num_experts, lhs_data.shape[0], rhs_data.shape[0]), dtype=out_dtype)


@torch_op(fake=_fake_k_grouped)
def _emulated_k_grouped(
    lhs_data: Tensor, lhs_scale: Tensor, rhs_data: Tensor, rhs_scale: Tensor,
    num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    groups = TokenGroups(num_rows, *plan)
    if num_rows == 0:
        return _fake_k_grouped(lhs_data, lhs_scale, rhs_data, rhs_scale, num_rows, plan, out_dtype).zero_()
    return _products(lhs_data, lhs_scale, rhs_data, rhs_scale, groups).to(out_dtype)


@torch_op(fake=returns_nothing, mutates_args=("into",))
def _emulated_k_grouped_add(
    lhs_data: Tensor, lhs_scale: Tensor, rhs_data: Tensor, rhs_scale: Tensor,
    num_rows: int, plan: Sequence[Tensor], into: Tensor,
) -> None:  # fmt: skip
    if num_rows > 0:
        into.add_(_products(lhs_data, lhs_scale, rhs_data, rhs_scale, TokenGroups(num_rows, *plan)))


def _products(lhs_data: Tensor, lhs_scale: Tensor, rhs_data: Tensor, rhs_scale: Tensor, groups: TokenGroups) -> Tensor:
    """Wgrad in fp32 `(E, N, K)`, for at least one token."""
    layout = TokenLayout.SIDE_BY_SIDE
    lhs = reference.dequantize_tokens(TokenOperand(lhs_data, lhs_scale, layout), groups)  # (N, R)
    rhs = reference.dequantize_tokens(TokenOperand(rhs_data, rhs_scale, layout), groups)  # (K, R)
    with torch.autocast(lhs_data.device.type, enabled=False):
        return F.grouped_mm(lhs, rhs.t(), offs=groups.padded_ends)
