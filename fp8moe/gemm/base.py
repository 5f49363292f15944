"""What a backend is: the two grouped GEMMs, and an honest account of what it lacks on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot be used; the message names the reason and the fix."""


class Gemm(Enum):
    """The three GEMMs of one differentiable grouped matrix product. Each may come from another backend."""

    FORWARD = "forward"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


@dataclass(frozen=True)
class Missing:
    """One thing that keeps a backend from computing a GEMM, and what the user can do about it."""

    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.reason} Fix: {self.fix}"


def missing_hopper(capability: tuple[int, int] | None) -> list[Missing]:
    """What a device lacks for kernels that are made for Hopper.

    Args:
        capability: its compute capability, or None where it is not an NVIDIA GPU.
    """
    if capability == (9, 0):
        return []
    if capability is None:
        reason = "No NVIDIA GPU: these kernels are for Hopper."
    else:
        found = ".".join(map(str, capability))
        reason = f"Wrong architecture: compute capability {found}, and these kernels are for 9.0 (Hopper)."
    return [Missing(reason, "run on an H100 or H200.")]


class GroupedGemm(Protocol):
    """A backend. Its methods take and return plain device tensors, and never read them on the host."""

    token_layout: TokenLayout
    """The layout in which `k_grouped` takes its operands."""

    fastest_token_tile: int
    """Tokens that share a scale on the right side of `k_grouped`: 256 where that is faster than 128 and costs no
    accuracy that training shows, else 128."""

    def missing(self, gemm: Gemm, device: torch.device) -> tuple[Missing, ...]:
        """All that keeps this backend from computing `gemm` on `device`; empty if it can."""
        ...

    def missing_for_sizes(self, gemm: Gemm, n: int, k: int) -> tuple[Missing, ...]:
        """All that keeps it from computing `gemm` with a weight `(E, N, K)`; empty if it can."""
        ...

    def m_grouped(
        self,
        lhs: RowOperand,
        rhs: WeightOperand,
        groups: TokenGroups,
        out_dtype: torch.dtype,
        num_features: int | None = None,
    ) -> Tensor:
        """Forward and dgrad: each group's rows times its own weight, `out[m] = lhs[row of m] @ rhs[expert of m].T`.

        Args:
            lhs: `(R, K)`.
            rhs: `(E, N, K)`.
            groups: where the rows lie.
            out_dtype: of the result.
            num_features: how many of the `N` features the result has, the first ones; all by default.

        Returns:
            `(M, num_features)` in `out_dtype`, contiguous, ragged rows in the caller's order; rows of no group are
            zeros.
        """
        ...

    def k_grouped(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, out_dtype: torch.dtype) -> Tensor:
        """Wgrad: contracts each group's tokens, `out[e] = lhs[:, tokens of e] @ rhs[:, tokens of e].T`.

        Args:
            lhs: `(N, R)`, `N` any size.
            rhs: `(K, R)`, likewise.

        Returns:
            `(E, N, K)` in `out_dtype`, contiguous; exactly zero for a group without tokens.
        """
        ...

    def k_grouped_add(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, into: Tensor) -> None:
        """Add the products of `k_grouped` to `into`, in place; the part of a group without tokens stays as it is.

        Args:
            lhs: `(N, R)`.
            rhs: `(K, R)`.
            into: fp32 `(E, N, K)`, contiguous.
        """
        ...


def empty_m_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
    num_features: int | None,
) -> Tensor:  # fmt: skip
    """The uninitialized result of a backend's M-grouped operator, from that operator's arguments.

    Args:
        lhs: the tensors of a `RowOperand`.
        rhs: data and scale of a `WeightOperand`.
        num_rows, plan: of `TokenGroups`.
        out_dtype, num_features: of the result.
    """
    features = rhs[0].shape[1] if num_features is None else num_features
    return torch.empty((num_rows, features), dtype=out_dtype, device=lhs[0].device)


def empty_k_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, out_dtype: torch.dtype, *options: object
) -> Tensor:
    """The same for a K-grouped operator that takes only the groups' ends; `lhs` and `rhs` are the tensors of
    `TokenOperand`s, whose scales tell `N` and `K` in any layout."""
    shape = (padded_ends.shape[0], lhs[1].shape[1], rhs[1].shape[1])
    return torch.empty(shape, dtype=out_dtype, device=lhs[0].device)
