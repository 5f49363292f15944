"""The reference backend: dequantize the FP8 operands and multiply in fp32. Runs anywhere PyTorch does."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.gemm.base import Gemm, Missing, empty_k_grouped, empty_m_grouped
from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import reference
from fp8moe.rows.unused_rows import zero_unused_rows_
from fp8moe.torch_op import returns_nothing, torch_op


class Emulated:
    """`GroupedGemm` on `torch.nn.functional.grouped_mm` in fp32."""

    token_layout = TokenLayout.SIDE_BY_SIDE
    fastest_token_tile = 256  # as TRITON: what a CPU computes is what AUTO computes on Hopper

    def missing(self, gemm: Gemm, device: torch.device) -> tuple[Missing, ...]:
        return ()

    def missing_for_sizes(self, gemm: Gemm, n: int, k: int) -> tuple[Missing, ...]:
        return ()

    def m_grouped(
        self,
        lhs: RowOperand,
        rhs: WeightOperand,
        groups: TokenGroups,
        out_dtype: torch.dtype,
        num_features: int | None = None,
    ) -> Tensor:
        return _emulated_m_grouped(lhs.tensors, rhs.tensors, groups.num_rows, groups.tensors, out_dtype, num_features)

    def k_grouped(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, out_dtype: torch.dtype) -> Tensor:
        return _emulated_k_grouped(lhs.tensors, rhs.tensors, groups.num_rows, groups.tensors, out_dtype)

    def k_grouped_add(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, into: Tensor) -> None:
        _emulated_k_grouped_add(lhs.tensors, rhs.tensors, groups.num_rows, groups.tensors, into)


@torch_op(fake=empty_m_grouped)
def _emulated_m_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
    num_features: int | None,
) -> Tensor:  # fmt: skip
    if num_rows == 0:
        return empty_m_grouped(lhs, rhs, num_rows, plan, out_dtype, num_features)
    groups = TokenGroups(num_rows, *plan)
    # Padding is dropped before the product rather than after it: fewer flops, and the rows come out ragged at once.
    padded = reference.dequantize_rows(RowOperand(*lhs))  # (R, K)
    ragged = padded[groups.token_row.clamp(min=0)]  # (M, K)
    weight = reference.dequantize_weight(WeightOperand(*rhs))  # (E, N, K)
    with torch.autocast(padded.device.type, enabled=False):
        out = F.grouped_mm(ragged, weight.transpose(-2, -1), offs=groups.ends)
    if num_features is not None and num_features < out.shape[1]:
        out = out[:, :num_features].clone(memory_format=torch.contiguous_format)  # an operator returns no views
    return zero_unused_rows_(out, groups.ends).to(out_dtype)


def _empty_k_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype
) -> Tensor:
    return empty_k_grouped(lhs, rhs, TokenGroups(num_rows, *plan).padded_ends, out_dtype)


@torch_op(fake=_empty_k_grouped)
def _emulated_k_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype
) -> Tensor:
    if num_rows == 0:
        return _empty_k_grouped(lhs, rhs, num_rows, plan, out_dtype).zero_()
    return _products(lhs, rhs, TokenGroups(num_rows, *plan)).to(out_dtype)


@torch_op(fake=returns_nothing, mutates_args=("into",))
def _emulated_k_grouped_add(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], into: Tensor
) -> None:
    if num_rows > 0:
        into.add_(_products(lhs, rhs, TokenGroups(num_rows, *plan)))


def _products(lhs: Sequence[Tensor], rhs: Sequence[Tensor], groups: TokenGroups) -> Tensor:
    """Wgrad in fp32 `(E, N, K)`, contiguous, for at least one token."""
    n_by_rows, k_by_rows = (
        reference.dequantize_tokens(TokenOperand.of(side, TokenLayout.SIDE_BY_SIDE), groups) for side in (lhs, rhs)
    )
    with torch.autocast(n_by_rows.device.type, enabled=False):
        return F.grouped_mm(n_by_rows, k_by_rows.t(), offs=groups.padded_ends).contiguous()
