"""`grouped_mm`: the differentiable grouped matrix product, forward, dgrad and wgrad in FP8."""

from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.once import differentiable_once
from fp8moe.autograd.validate import check_grouped_mm, check_offs_values
from fp8moe.config import FP8Config, KernelPreference, ScaleFormat, check_config
from fp8moe.gemm.bf16 import k_grouped_bf16, m_grouped_bf16
from fp8moe.gemm.select import BACKENDS, BF16, fp8_pays, selected_backends
from fp8moe.groups import TokenGroups, ends_within
from fp8moe.operands import TokenOperand
from fp8moe.quantize import (
    quantize_rows,
    quantize_rows_and_tokens,
    quantize_tokens,
    quantize_weight_for_dgrad,
    quantize_weight_for_forward,
)

DEFAULT_CONFIG = FP8Config()


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *, config: FP8Config = DEFAULT_CONFIG) -> Tensor:
    """A differentiable `torch.nn.functional.grouped_mm` (2D x 3D) in FP8: each group's rows times its own matrix.

        out[offs[e-1]:offs[e]] = a[offs[e-1]:offs[e]] @ b[e]

    Activations and gradients are quantized in 1 x 128 tiles, weights in 128 x 128 blocks, to E4M3 (the recipe of
    DeepSeek-V3, arXiv 2412.19437); products accumulate in FP32. For backward it saves `a` in FP8, `b`, the row plan.
    Groups may be ragged, unaligned and empty. Nothing here reads the device on the host (`KernelPreference.EMULATED`
    on CUDA excepted, where `torch.nn.functional.grouped_mm` in fp32 does).

    Args:
        a: `(M, K)` bf16, fp16 or fp32, any strides, the rows of each group together; `K` a multiple of 128.
        b: `(E, K, N)` bf16, fp16 or fp32, any strides; `N` a multiple of 128. A weight stored `(E, N, K)` is passed as
            `w.transpose(-2, -1)`. Its dtype may differ from that of `a`: fp32 weights need no BF16 copy.
        offs: int32 `(E,)` on the device of `a`: end row of each group, non-decreasing, at most `M`. Rows of no group,
            from `offs[-1]` on, come out as zeros, and their gradient is zero. An offset that decreases or passes `M`
            is raised to the running maximum and cut at `M`, unseen unless `config.debug` checks it.
        config: backend, scale format and checks.

    Returns:
        `(M, N)` contiguous, in the dtype of `a`, under autocast in the autocast dtype. The gradients come in the dtypes
        of `a` and `b`. It can be differentiated once.

    Raises:
        TypeError: an argument is not of the right type or dtype.
        ValueError: an argument has the wrong rank, shape or device, or `K` or `N` is not a multiple of 128.
        BackendUnavailableError: `config.kernel_preference` names a backend that cannot be used here.
    """
    check_config(config)
    check_grouped_mm(a, b, offs)
    if config.debug:
        check_offs_values(offs, a.shape[0])
    device = a.device
    autocast = torch.is_autocast_enabled(device.type)
    out_dtype = torch.get_autocast_dtype(device.type) if autocast else a.dtype
    pays = True
    if config.kernel_preference is KernelPreference.AUTO and config.allow_bf16 and a.is_cuda:
        # Only where it decides: under torch.compile a comparison of M becomes a guard (and a plain bool only by `if`).
        pays = True if fp8_pays(a.shape[0], b.shape[2], a.shape[1], b.shape[0]) else False  # noqa: SIM210
    backends = selected_backends(str(device), config.kernel_preference.value, config.allow_bf16, pays)
    if backends == BF16:
        return _BF16GroupedMM.apply(a, b, offs, out_dtype)
    # Within Function.forward grad mode is always off: whether there will be a backward is known only here.
    needs_wgrad = torch.is_grad_enabled() and b.requires_grad
    return _FP8GroupedMM.apply(a, b, offs, out_dtype, backends.split(","), config.scale_format, needs_wgrad)


class _FP8GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype,
        backends: list[str], scale_format: ScaleFormat, needs_wgrad: bool,
    ) -> Tensor:  # fmt: skip
        forward, _, wgrad = (BACKENDS[KernelPreference(backend)] for backend in backends)
        groups = TokenGroups.from_offs(offs, a.shape[0])
        saved_a: list[Tensor] = []
        if needs_wgrad:
            rows, tokens = quantize_rows_and_tokens(a, groups, scale_format, wgrad.token_layout)
            saved_a = [tokens.data, tokens.scale.t()]  # as stored: a hook that moves it away loses its strides
        else:
            rows = quantize_rows(a, groups, scale_format)
        weight = quantize_weight_for_forward(b.transpose(1, 2), scale_format)
        ctx.save_for_backward(b if ctx.needs_input_grad[0] else None, *groups.tensors, *saved_a)
        ctx.a_dtype, ctx.b_dtype, ctx.backends, ctx.scale_format = a.dtype, b.dtype, backends, scale_format
        return forward.m_grouped(rows, weight, groups, out_dtype)

    @staticmethod
    @differentiable_once("fp8moe.grouped_mm")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _, dgrad, wgrad = (BACKENDS[KernelPreference(backend)] for backend in ctx.backends)
        b, *saved = ctx.saved_tensors
        groups = TokenGroups(dout.shape[0], *saved[:5])
        needs_da, needs_db = ctx.needs_input_grad[:2]
        if needs_da and needs_db:
            dout_rows, dout_tokens = quantize_rows_and_tokens(dout, groups, ctx.scale_format, wgrad.token_layout)
        elif needs_da:
            dout_rows = quantize_rows(dout, groups, ctx.scale_format)
        elif needs_db:
            dout_tokens = quantize_tokens(dout, groups, ctx.scale_format, wgrad.token_layout)
        da = db = None
        if needs_da:
            weight = quantize_weight_for_dgrad(b.transpose(1, 2), ctx.scale_format)
            da = dgrad.m_grouped(dout_rows, weight, groups, ctx.a_dtype)
        if needs_db:
            data, scale = saved[5:]
            a_tokens = TokenOperand(data, scale.t(), wgrad.token_layout)
            db = wgrad.k_grouped(dout_tokens, a_tokens, groups, ctx.b_dtype).transpose(1, 2)
        return da, db, None, None, None, None, None


class _BF16GroupedMM(torch.autograd.Function):
    """What AUTO runs where FP8 does not pay: the same promises, in BF16."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Tensor:
        ends = ends_within(offs, a.shape[0])
        needs_da, needs_db = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if needs_db else None, b if needs_da else None, ends)
        ctx.a_dtype, ctx.b_dtype = a.dtype, b.dtype
        return m_grouped_bf16(a, b, ends, out_dtype)

    @staticmethod
    @differentiable_once("fp8moe.grouped_mm")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        a, b, ends = ctx.saved_tensors
        needs_da, needs_db = ctx.needs_input_grad[:2]
        da = m_grouped_bf16(dout, b.transpose(1, 2), ends, ctx.a_dtype) if needs_da else None
        db = k_grouped_bf16(dout, a, ends, ctx.b_dtype).transpose(1, 2) if needs_db else None
        return da, db, None, None
