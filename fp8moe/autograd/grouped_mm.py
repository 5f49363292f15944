"""`grouped_mm`: the differentiable grouped matrix product, forward, dgrad and wgrad in FP8."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.expert_mlp import Observation
from fp8moe.autograd.gradient_of_b import a_is_on_the_right, gradient_of_b, needs_db, or_nothing
from fp8moe.autograd.grouped_mm_in_bf16 import grouped_mm_in_bf16
from fp8moe.autograd.handed_over import Operands
from fp8moe.autograd.main_grad import with_main_grad
from fp8moe.autograd.observed import observation_of
from fp8moe.autograd.once import differentiable_once
from fp8moe.autograd.validate import check_grouped_mm, check_main_grad_of_b, check_offs_values, check_weight_cache
from fp8moe.autograd.weights import ExpertWeight, KeptWeight, expert_product, forward_product
from fp8moe.config import FP8Config, ScaleFormat, check_config
from fp8moe.gemm.select import BACKENDS, Backends, backends_for, token_tile_for
from fp8moe.operands import TokenGroups, TokenOperand
from fp8moe.quantize import quantize_operands
from fp8moe.quantize.weight_cache import WeightCache
from fp8moe.quantize.weight_source import handle_after_use
from fp8moe.rows.groups import ends_of, plan_groups

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
    DeepSeek-V3, arXiv 2412.19437); in the weight gradient 256 tokens of `a` share a scale where that is faster
    (`FP8Config.wgrad_token_tile`). Products accumulate in FP32. For backward it saves `a` in FP8, `b`, the row plan.
    Groups may be ragged, unaligned and empty, and `K` and `N` any size: quantization pads them to multiples of 128, and
    nothing else. Nothing here reads the device on the host (`KernelPreference.EMULATED` on CUDA excepted, where
    `torch.nn.functional.grouped_mm` in fp32 does).

    Args:
        a: `(M, K)` bf16, fp16 or fp32, any strides, the rows of each group together.
        b: `(E, K, N)` bf16, fp16 or fp32, any strides. A weight stored `(E, N, K)` is passed as
            `w.transpose(-2, -1)`. Its dtype may differ from that of `a`: fp32 weights need no BF16 copy.
        offs: int32 `(E,)` on the device of `a`: end row of each group, non-decreasing, at most `M`. Rows of no group,
            from `offs[-1]` on, come out as zeros, and their gradient is zero. An offset that decreases or passes `M`
            is raised to the running maximum and cut at `M`, unseen unless `config.debug` checks it. If there can be
            neither, `FP8Config(assume_full=True)` saves time in BF16.
        config: backend, scale format and checks.
        main_grad: fp32 `(E, K, N)`, contiguous or the transpose of a contiguous `(E, N, K)`: the weight gradient is
            added to it in backward, in place, and `b` gets none. For a weight stored `(E, N, K)` pass
            `w.main_grad.transpose(-2, -1)`. If `b` needs no gradient, it is left alone.
            A backward that does not go on to `b`, such as `torch.autograd.grad(out, a)`, leaves it alone; one that asks
            for the gradient of `b` gets a sparse tensor of no elements. It is never reduced over ranks: within
            DistributedDataParallel (but for `no_sync`) and FSDP it is refused.
            In compiled code every backward adds to it, whatever is asked for; run each before the next forward, or
            autograd refuses it.
        weight_cache: of this weight: `WeightCache(w)` where `b` is `w.transpose(-2, -1)`. Not used where AUTO takes
            BF16, which it does for fewer sizes with a cache.

    Returns:
        `(M, N)` contiguous, in the dtype of `a`, under autocast in the autocast dtype. The gradients come in the dtypes
        of `a` and `b`. It can be differentiated once.

    Raises:
        TypeError: an argument is not of the right type or dtype.
        ValueError: an argument has the wrong rank, shape, layout or device, `K` or `N` is 0,
            `main_grad` itself needs a gradient, or `weight_cache` is of other memory than `b`.
        BackendUnavailableError: `config.kernel_preference` names a backend that cannot be used here.
    """
    check_config(config)
    check_grouped_mm(a, b, offs)
    check_main_grad_of_b(main_grad, b)
    check_weight_cache(weight_cache)
    if config.debug:
        check_offs_values(offs, a.shape[0], config.assume_full)
    (m, k), (num_experts, _, n) = a.shape, b.shape
    # Within Function.forward grad mode is always off: whether there will be a backward is known only here.
    needs_wgrad = torch.is_grad_enabled() and b.requires_grad
    backends = backends_for(
        config, a.device, (m, n, k, num_experts), cached=weight_cache is not None, needs_wgrad=needs_wgrad
    )
    if not backends:
        ends = ends_of(offs, m, config.assume_full)
        return grouped_mm_in_bf16(a, b, ends, main_grad, output_dtype(a), zero_unused=not config.assume_full)
    keeps_weight = torch.is_grad_enabled() and config.keep_quantized_weights
    observed = observation_of(a, is_product=True)
    token_tile = token_tile_for(config, backends.wgrad, on_the_right=a_is_on_the_right(b.is_contiguous(), main_grad))
    plan = Plan(backends, config.scale_format, token_tile, needs_wgrad, keeps_weight, observed)
    handle = None if weight_cache is None else weight_cache.handle
    return _FP8GroupedMM.apply(a, with_main_grad(b, main_grad), offs, plan, output_dtype(a), main_grad, handle)


@dataclass(frozen=True)
class Plan:
    """How a product is computed: all that is no tensor."""

    backends: Backends
    scale_format: ScaleFormat
    token_tile: int
    """Tokens of `a` that share a scale in wgrad."""
    needs_wgrad: bool
    keeps_weight: bool
    """Whether forward keeps the dgrad operand of `b` for backward."""
    observed: Observation | None
    """What looks on, if anybody watches."""


class _FP8GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, offs: Tensor, plan: Plan, out_dtype: torch.dtype,
        main_grad: Tensor | None, cache_handle: Tensor | None,
    ) -> Tensor:  # fmt: skip
        groups = plan_groups(offs, a.shape[0])
        layout = BACKENDS[plan.backends.wgrad].token_layout if plan.needs_wgrad else None
        rows, tokens = quantize_operands(
            a, groups, plan.scale_format, rows=True, tokens=layout, token_tile=plan.token_tile
        )  # (R, K), (K, R)
        weight, operands = ExpertWeight((b.transpose(1, 2),), cache_handle), Operands(rows)  # (E, N, K)
        del rows
        if plan.observed is not None:
            plan.observed.routed(groups.ends)
            plan.observed.operand("a", a, groups, plan.scale_format, rows=True, tokens=plan.needs_wgrad)
            plan.observed.weight("b", weight, plan.scale_format)
        out, kept = forward_product(
            plan.backends.forward, operands.take_rows, weight, groups, b.shape[2], out_dtype, plan.scale_format,
            keep=plan.keeps_weight and ctx.needs_input_grad[0],
        )  # fmt: skip
        # Operands as they are stored: a hook that moves a saved tensor away loses its strides.
        stored_tokens = (None, None) if tokens is None else tokens.tensors
        handle = cache_handle if cache_handle is None else handle_after_use(cache_handle)
        ctx.save_for_backward(
            b if ctx.needs_input_grad[0] and kept.data is None else None, *kept, *stored_tokens, handle, *groups.tensors
        )
        ctx.num_features = a.shape[1]
        ctx.plan, ctx.a_dtype, ctx.b_dtype, ctx.b_is_contiguous = plan, a.dtype, b.dtype, b.is_contiguous()
        ctx.main_grad = main_grad  # not saved: one backward changes it, and others may follow
        if plan.observed is not None:
            plan.observed.result("out", out)
        return out

    @staticmethod
    @differentiable_once("fp8moe.grouped_mm")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        b, w_data, w_scale, a_data, a_scale, cache_handle, *maps = ctx.saved_tensors
        groups, wgrad = TokenGroups(dout.shape[0], *maps), BACKENDS[plan.backends.wgrad]
        needs_da, wants_db = ctx.needs_input_grad[0], needs_db(ctx)
        if plan.observed is not None:
            plan.observed.operand("d_out", dout, groups, plan.scale_format, rows=needs_da, tokens=wants_db)
        rows, tokens = quantize_operands(
            dout, groups, plan.scale_format, rows=needs_da, tokens=wgrad.token_layout if wants_db else None
        )  # (R, N), (N, R)
        da = db = None
        if rows is not None:
            parts = () if b is None else (b.transpose(1, 2),)  # (E, N, K)
            weight = ExpertWeight(parts, cache_handle, kept=KeptWeight(w_data, w_scale))
            d_out = Operands(rows)
            del rows  # before the gradient of b takes memory
            da = expert_product(
                plan.backends.dgrad, d_out.take_rows, weight, groups, ctx.num_features, ctx.a_dtype, plan.scale_format,
                for_dgrad=True,
            )  # (M, K)  # fmt: skip
            if plan.observed is not None:
                plan.observed.result("d_a", da)
        if tokens is not None:
            a_tokens = TokenOperand(a_data, a_scale, wgrad.token_layout, plan.token_tile)  # (K, R)
            db = gradient_of_b(
                a_tokens, tokens, ctx.b_is_contiguous, ctx.main_grad,
                product=lambda lhs, rhs: wgrad.k_grouped(lhs, rhs, groups, ctx.b_dtype),
                add=lambda lhs, rhs, into: wgrad.k_grouped_add(lhs, rhs, groups, into),
            )  # fmt: skip
        return da, or_nothing(ctx, db), None, None, None, None, None
