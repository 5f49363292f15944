"""The library's own backend: grouped GEMMs in Gluon for Hopper, with no dependency but Triton."""

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fp8moe.devices import compute_capability, multiprocessors
from fp8moe.gemm.base import Gemm, Missing, empty_k_grouped, empty_m_grouped, missing_hopper
from fp8moe.operands import TMA_ALIGNMENT, RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand
from fp8moe.torch_op import returns_nothing, torch_op


class TritonGemm:
    """`GroupedGemm` on the kernels of `fp8moe.kernels.sm90`, compiled at first use, once for all shapes."""

    token_layout = TokenLayout.SIDE_BY_SIDE
    fastest_token_tile = 256  # the scales of the right side, one for each column, are applied half as often

    def missing(self, gemm: Gemm, device: torch.device) -> tuple[Missing, ...]:
        return missing_for_triton(compute_capability(device))

    def missing_for_sizes(self, gemm: Gemm, n: int, k: int) -> tuple[Missing, ...]:
        """Triton makes an argument that is 1 a constant, and with a number of features of 1 Triton 3.6 miscompiles
        kernels that mask them (seen on an H200)."""
        if n > 1 and k > 1:
            return ()
        reason = f"These kernels take two features or more, and the weight has the sizes {n} and {k}."
        return (Missing(reason, "name KernelPreference.EMULATED or AUTO, or pad the features to two."),)

    def m_grouped(
        self,
        lhs: RowOperand,
        rhs: WeightOperand,
        groups: TokenGroups,
        out_dtype: torch.dtype,
        num_features: int | None = None,
    ) -> Tensor:
        return _triton_m_grouped(lhs.tensors, rhs.tensors, groups.num_rows, groups.tensors, out_dtype, num_features)

    def k_grouped(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, out_dtype: torch.dtype) -> Tensor:
        return _triton_k_grouped(lhs.tensors, rhs.tensors, groups.padded_ends, out_dtype, rhs.token_tile)

    def k_grouped_add(self, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, into: Tensor) -> None:
        """As in `GroupedGemm`; `into` may also be bf16 or fp16, which takes memory for an fp32 product."""
        _triton_k_grouped_add(lhs.tensors, rhs.tensors, groups.padded_ends, into, rhs.token_tile)


def missing_for_triton(capability: tuple[int, int] | None) -> tuple[Missing, ...]:
    """What keeps these kernels from running on a device.

    Args:
        capability: its compute capability, or None where it is not an NVIDIA GPU.
    """
    return (*missing_hopper(capability), *_missing_in_triton())


@cache
def _missing_in_triton() -> tuple[Missing, ...]:
    if importlib.util.find_spec("triton") is None:
        return (Missing("The module triton is not installed.", "pip install 'triton>=3.6' (Linux only)."),)
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        reason = f"Triton {triton.__version__} is too old: its Gluon lacks what these kernels use."
        return (Missing(reason, "pip install 'triton>=3.6'."),)
    try:
        importlib.import_module("fp8moe.kernels.sm90.ring")
    except (ImportError, AttributeError) as error:
        reason = f"Triton {triton.__version__} has a Gluon that these kernels do not know ({error})."
        return (Missing(reason, "install a Triton from 3.6 to 3.9."),)
    return ()


@torch_op(fake=empty_m_grouped)
def _triton_m_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], num_rows: int, plan: Sequence[Tensor], out_dtype: torch.dtype,
    num_features: int | None,
) -> Tensor:  # fmt: skip
    out = empty_m_grouped(lhs, rhs, num_rows, plan, out_dtype, num_features)
    if num_rows > 0:
        from fp8moe.kernels.sm90.m_grouped import launch_m_grouped

        groups = TokenGroups(num_rows, *plan)
        (lhs_data, lhs_scale), (rhs_data, rhs_scale) = lhs, rhs
        launch_m_grouped(
            lhs_data, lhs_scale, rhs_data, rhs_scale,
            groups.row_expert, groups.row_source, groups.ends, groups.padded_ends, out,
            multiprocessors=multiprocessors(out.device),
        )  # fmt: skip
    return out


@torch_op(fake=empty_k_grouped)
def _triton_k_grouped(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, out_dtype: torch.dtype, rhs_token_tile: int
) -> Tensor:
    out = empty_k_grouped(lhs, rhs, padded_ends, out_dtype)
    if lhs[0].shape[1] == 0:
        return out.zero_()
    _k_grouped_into(lhs, rhs, padded_ends, out, rhs_token_tile, accumulate=False)
    return out


@torch_op(fake=returns_nothing, mutates_args=("into",))
def _triton_k_grouped_add(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, into: Tensor, rhs_token_tile: int
) -> None:
    if lhs[0].shape[1] == 0:
        return
    if into.dtype == torch.float32 and into.data_ptr() % TMA_ALIGNMENT == 0:
        _k_grouped_into(lhs, rhs, padded_ends, into, rhs_token_tile, accumulate=True)
        torch.autograd.graph.increment_version(into)
    else:  # a slice of a flat gradient buffer may start anywhere; a sum in bf16 or fp16 is rounded once
        into += _triton_k_grouped(lhs, rhs, padded_ends, torch.float32, rhs_token_tile)


def _k_grouped_into(
    lhs: Sequence[Tensor], rhs: Sequence[Tensor], padded_ends: Tensor, out: Tensor, rhs_token_tile: int,
    *, accumulate: bool,
) -> None:  # fmt: skip
    from fp8moe.kernels.sm90.wgrad import launch_wgrad

    (lhs_data, lhs_scale), (rhs_data, rhs_scale) = lhs, rhs
    launch_wgrad(
        lhs_data, rhs_data, lhs_scale, rhs_scale, padded_ends, out,
        accumulate=accumulate, multiprocessors=multiprocessors(out.device), rhs_token_tile=rhs_token_tile,
    )  # fmt: skip
