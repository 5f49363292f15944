"""The DeepGEMM backend: its SM90 kernels, on operands that are made in its own layouts.

Facts about its contract, read from its source and checked on an H200 (sgl-deep-gemm 0.1.5):
- Row scales with strides `(1, R)`, `R` a multiple of 4, and token scales stored `(R/128, D)` are used as they are;
  with any other layout it launches a transpose first, or misreads them.
- The M-grouped kernel takes the expert of a block of 128 rows from the first entry of the row -> expert map, and skips
  blocks that start with -1. Of its two layouts, the row map and the padded ends, neither is faster throughout.
- The K-grouped kernel reads the group sizes from the device tensor. Its host list feeds only assertions and the
  choice of tiles, so a static list with the right sum will do: nothing waits for the routing.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.devices import compute_capability, current_device
from fp8moe.gemm.base import Gemm, Missing, empty_k_grouped, empty_m_grouped
from fp8moe.gemm.deepgemm_probe import missing_in_deepgemm
from fp8moe.operands import BLOCK, TMA_ALIGNMENT, RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand
from fp8moe.rows.unpad import unpad
from fp8moe.torch_op import returns_nothing, torch_op

MIN_GROUPS_FOR_MULTICAST = 5
"""With fewer groups the K-grouped kernel multicasts tiles between thread blocks; where a dimension has an odd number
of 128-wide tiles the two blocks of a pair can belong to different groups (open upstream)."""


class DeepGemm:
    """`GroupedGemm` on DeepGEMM (import name `deep_gemm`), which is compiled at first use for each shape."""

    token_layout = TokenLayout.PER_EXPERT
    fastest_token_tile = BLOCK  # its kernel applies a scale every 128 tokens in any case

    def missing(self, gemm: Gemm, device: torch.device) -> tuple[Missing, ...]:
        return missing_in_deepgemm(gemm, compute_capability(device))

    def missing_for_sizes(self, gemm: Gemm, n: int, k: int) -> tuple[Missing, ...]:
        """Its wgrad writes tiles of 128 x 128 as a whole: past the edge of one expert lies the next."""
        if gemm is not Gemm.WGRAD or (n % BLOCK == 0 and k % BLOCK == 0):
            return ()
        reason = f"Its wgrad takes only multiples of {BLOCK}, and the weight has the sizes {n} and {k}."
        return (Missing(reason, "name KernelPreference.TRITON or AUTO, which take any size."),)

    def m_grouped(
        self,
        lhs: RowOperand,
        rhs: WeightOperand,
        groups: TokenGroups,
        out_dtype: torch.dtype,
        num_features: int | None = None,
    ) -> Tensor:
        return _deepgemm_m_grouped(lhs.tensors, rhs.tensors, groups.num_rows, groups.tensors, out_dtype, num_features)

    def k_grouped(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, out_dtype: torch.dtype) -> Tensor:
        return _deepgemm_k_grouped(lhs.tensors, rhs.tensors, groups.padded_ends, out_dtype)

    def k_grouped_add(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, into: Tensor) -> None:
        _deepgemm_k_grouped_add(lhs.tensors, rhs.tensors, groups.padded_ends, into)


@cache
def _deep_gemm() -> ModuleType:
    import deep_gemm

    return deep_gemm


@torch_op(fake=empty_m_grouped)
def _deepgemm_m_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
    num_features: int | None,
) -> Tensor:  # fmt: skip
    out = empty_m_grouped(lhs, rhs, num_rows, plan, out_dtype, num_features)
    if num_rows == 0:
        return out
    groups = TokenGroups(num_rows, *plan)
    (lhs_data, lhs_scale), (rhs_data, rhs_scale) = lhs, rhs
    padded = lhs_data.new_empty((groups.capacity, rhs_data.shape[1]), dtype=torch.bfloat16)
    with current_device(lhs_data):
        _deep_gemm().m_grouped_fp8_gemm_nt_contiguous(
            (lhs_data, lhs_scale.t()),
            (rhs_data, rhs_scale),
            padded,
            groups.row_expert,
            recipe_a=(1, 128),
            recipe_b=(128, 128),
            disable_ue8m0_cast=True,
        )
    return unpad(padded, groups, out)


@torch_op(fake=empty_k_grouped)
def _deepgemm_k_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, out_dtype: torch.dtype
) -> Tensor:
    num_experts, n, k = padded_ends.shape[0], lhs[1].shape[1], rhs[1].shape[1]
    num_groups = _num_groups(num_experts, n, k)
    accumulated = lhs[0].new_zeros((num_groups, n, k), dtype=torch.float32)
    _accumulate(lhs, rhs, padded_ends, accumulated)
    # A view of the first experts would keep the added groups alive.
    used = accumulated[:num_experts]
    return used.to(out_dtype) if out_dtype != torch.float32 or num_groups == num_experts else used.clone()


@torch_op(fake=returns_nothing, mutates_args=("into",))
def _deepgemm_k_grouped_add(lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, into: Tensor) -> None:
    num_experts, n, k = into.shape
    num_groups = _num_groups(num_experts, n, k)
    if num_groups == num_experts and into.data_ptr() % TMA_ALIGNMENT == 0:
        _accumulate(lhs, rhs, padded_ends, into)
        torch.autograd.graph.increment_version(into)
    else:  # `into` has no room for the added groups, or an address that the kernel cannot take
        accumulated = into.new_zeros((num_groups, n, k))
        _accumulate(lhs, rhs, padded_ends, accumulated)
        into.add_(accumulated[:num_experts])


def _num_groups(num_experts: int, n: int, k: int) -> int:
    """`E`, or more groups (those added are empty), so that the K-grouped kernel never multicasts unsafely."""
    multicast_is_safe = num_experts >= MIN_GROUPS_FOR_MULTICAST or (n % 256 == 0 and k % 256 == 0)
    return num_experts if multicast_is_safe else MIN_GROUPS_FOR_MULTICAST


def _accumulate(lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, into: Tensor) -> None:
    """Add to `into`, fp32 `(_num_groups, N, K)`, in place: the kernel adds to what it finds and skips empty groups."""
    (lhs_data, lhs_scale), (rhs_data, rhs_scale) = lhs, rhs
    capacity = lhs_scale.shape[0] * 128
    if capacity == 0:
        return
    num_groups, num_experts = into.shape[0], padded_ends.shape[0]
    group_rows = torch.diff(padded_ends, prepend=padded_ends.new_zeros(1))
    static_rows = [capacity] + [0] * (num_groups - 1)
    with current_device(lhs_data):
        _deep_gemm().k_grouped_fp8_gemm_nt_contiguous(
            (lhs_data, lhs_scale.t()),
            (rhs_data, rhs_scale.t()),
            into,
            static_rows,
            F.pad(group_rows, (0, num_groups - num_experts)),
            into,
            (1, 1, 128),
        )
