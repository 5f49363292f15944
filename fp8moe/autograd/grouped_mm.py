"""`grouped_mm`: the differentiable grouped matrix product, forward, dgrad and wgrad in FP8."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.once import differentiable_once
from fp8moe.autograd.quantized_weight import NOT_CACHED, cached_tensors, dgrad_operand, forward_operand
from fp8moe.autograd.validate import check_grouped_mm, check_main_grad, check_offs_values, check_weight_cache
from fp8moe.config import FP8Config, ScaleFormat, check_config
from fp8moe.gemm.bf16 import k_grouped_add_bf16, k_grouped_bf16, m_grouped_bf16
from fp8moe.gemm.cost import OpSize
from fp8moe.gemm.select import BACKENDS, Backends, select_backends
from fp8moe.groups import TokenGroups, ends_within
from fp8moe.operands import TokenOperand
from fp8moe.quantize import quantize_rows, quantize_rows_and_tokens, quantize_tokens
from fp8moe.weight_cache import WeightCache

DEFAULT_CONFIG = FP8Config()


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    *,
    config: FP8Config = DEFAULT_CONFIG,
    main_grad: Tensor | None = None,
    weight_cache: WeightCache | None = None,
) -> Tensor:
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
        main_grad: fp32 `(E, K, N)`, contiguous or the transpose of a contiguous `(E, N, K)`: the weight gradient is
            added to it in backward, in place, and `b` gets none. For a weight stored `(E, N, K)` pass
            `w.main_grad.transpose(-2, -1)`. If `b` needs no gradient, it is left alone.
            In compiled code run each backward before the next forward: autograd refuses it otherwise.
        weight_cache: of this weight: `WeightCache(w)` where `b` is `w.transpose(-2, -1)`. See there what it may miss.
            Not used where AUTO takes BF16, which it does for fewer sizes with a cache.

    Returns:
        `(M, N)` contiguous, in the dtype of `a`, under autocast in the autocast dtype. The gradients come in the dtypes
        of `a` and `b`. It can be differentiated once.

    Raises:
        TypeError: an argument is not of the right type or dtype.
        ValueError: an argument has the wrong rank, shape, layout or device, `K` or `N` is not a multiple of 128,
            `main_grad` itself needs a gradient, or `weight_cache` is of other memory than `b`.
        BackendUnavailableError: `config.kernel_preference` names a backend that cannot be used here.
    """
    check_config(config)
    check_grouped_mm(a, b, offs)
    check_main_grad(main_grad, b)
    check_weight_cache(weight_cache)
    if config.debug:
        check_offs_values(offs, a.shape[0])
    size = OpSize.of_product(a.shape[0], b.shape[2], a.shape[1], b.shape[0])
    backends = select_backends(config, a.device, size, cached=weight_cache is not None)
    if backends is None:
        return grouped_mm_in_bf16(a, b, ends_within(offs, a.shape[0]), main_grad)
    # Within Function.forward grad mode is always off: whether there will be a backward is known only here.
    needs_wgrad = torch.is_grad_enabled() and b.requires_grad
    cached: tuple[Tensor | None, ...] = NOT_CACHED
    if weight_cache is not None:
        cached = cached_tensors(weight_cache, b.detach().transpose(1, 2), config.scale_format)
    return _FP8GroupedMM.apply(
        a, b, offs, output_dtype(a), backends, config.scale_format, config.wgrad_token_tile, needs_wgrad, main_grad,
        *cached,
    )  # fmt: skip


def grouped_mm_in_bf16(a: Tensor, b: Tensor, ends: Tensor, main_grad: Tensor | None) -> Tensor:
    """What AUTO runs where FP8 does not pay: `grouped_mm` of arguments that are checked, with the same promises.

    Args:
        a, b, main_grad: as in `grouped_mm`.
        ends: of `ends_within`; not checked.
    """
    return _BF16GroupedMM.apply(a, b, ends, output_dtype(a), main_grad)


class _FP8GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype,
        backends: Backends, scale_format: ScaleFormat, token_tile: int, needs_wgrad: bool,
        main_grad: Tensor | None,
        cached_forward: Tensor | None, cached_dgrad: Tensor | None, cached_scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        forward, wgrad = BACKENDS[backends.forward], BACKENDS[backends.wgrad]
        groups = TokenGroups.from_offs(offs, a.shape[0])
        saved_a: list[Tensor] = []
        if needs_wgrad:
            rows, tokens = quantize_rows_and_tokens(a, groups, scale_format, wgrad.token_layout, token_tile)
            saved_a = [*tokens.tensors]  # as stored: a hook that moves it away loses its strides
        else:
            rows = quantize_rows(a, groups, scale_format)
        weight = forward_operand(b.transpose(1, 2), cached_forward, cached_scale, scale_format)
        # With a cache `b` is saved for its version alone: a backward through a weight that has changed is refused.
        saved_b = [b, cached_dgrad, cached_scale] if ctx.needs_input_grad[0] else [None] * 3
        ctx.save_for_backward(*saved_b, *groups.tensors, *saved_a)
        ctx.a_dtype, ctx.b_dtype, ctx.backends = a.dtype, b.dtype, backends
        ctx.scale_format, ctx.token_tile = scale_format, token_tile
        ctx.b_is_contiguous = b.is_contiguous()
        ctx.main_grad = main_grad  # not saved: one backward changes it, and others may follow
        return forward.m_grouped(rows, weight, groups, out_dtype)

    @staticmethod
    @differentiable_once("fp8moe.grouped_mm")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dgrad, wgrad = BACKENDS[ctx.backends.dgrad], BACKENDS[ctx.backends.wgrad]
        b, cached_dgrad, cached_scale, *saved = ctx.saved_tensors
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
            weight = dgrad_operand(b.transpose(1, 2), cached_dgrad, cached_scale, ctx.scale_format)
            da = dgrad.m_grouped(dout_rows, weight, groups, ctx.a_dtype)
        if needs_db:
            a_tokens = TokenOperand.of(saved[5:], wgrad.token_layout, ctx.token_tile)
            db = _wgrad(
                a_tokens, dout_tokens, ctx.b_is_contiguous, ctx.main_grad,
                product=lambda lhs, rhs: wgrad.k_grouped(lhs, rhs, groups, ctx.b_dtype),
                add=lambda lhs, rhs, into: wgrad.k_grouped_add(lhs, rhs, groups, into),
            )  # fmt: skip
        return da, db, *[None] * 10


class _BF16GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, ends: Tensor, out_dtype: torch.dtype, main_grad: Tensor | None
    ) -> Tensor:
        needs_da, needs_db = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if needs_db else None, b if needs_da else None, ends)
        ctx.a_dtype, ctx.b_dtype = a.dtype, b.dtype
        ctx.b_is_contiguous = b.is_contiguous()
        ctx.main_grad = main_grad
        return m_grouped_bf16(a, b, ends, out_dtype)

    @staticmethod
    @differentiable_once("fp8moe.grouped_mm")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        a, b, ends = ctx.saved_tensors
        needs_da, needs_db = ctx.needs_input_grad[:2]
        da = m_grouped_bf16(dout, b.transpose(1, 2), ends, ctx.a_dtype) if needs_da else None
        db = None
        if needs_db:
            db = _wgrad(
                a, dout, ctx.b_is_contiguous, ctx.main_grad,
                product=lambda lhs, rhs: k_grouped_bf16(lhs, rhs, ends, ctx.b_dtype),
                add=lambda lhs, rhs, into: k_grouped_add_bf16(lhs, rhs, ends, into),
            )  # fmt: skip
        return da, db, None, None, None


Side = TypeVar("Side")


def _wgrad(
    a: Side, dout: Side, b_is_contiguous: bool, main_grad: Tensor | None,
    product: Callable[[Side, Side], Tensor], add: Callable[[Side, Side, Tensor], None],
) -> Tensor | None:  # fmt: skip
    """The gradient `(E, K, N)` of `b`, or None after adding it to `main_grad`.

    A product is contiguous in the order of its sides, and `(E, N, K)` or `(E, K, N)` may be the layout of `b` or of
    `main_grad`: the sides are swapped accordingly, and nothing needs a copy.
    """
    if main_grad is None:
        return product(a, dout) if b_is_contiguous else product(dout, a).transpose(1, 2)
    if main_grad.is_contiguous():
        add(a, dout, main_grad)
    else:
        add(dout, a, main_grad.transpose(1, 2))
    return None
