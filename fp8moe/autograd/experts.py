"""`swiglu_experts`: the whole expert MLP as one differentiable operation, six GEMMs in FP8 and little in between."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.autograd.choice import backends_for, output_dtype
from fp8moe.autograd.grouped_mm import DEFAULT_CONFIG, grouped_mm_in_bf16
from fp8moe.autograd.once import differentiable_once
from fp8moe.autograd.quantized_weight import NOT_CACHED, cached_tensors, dgrad_operand, forward_operand
from fp8moe.autograd.validate import check_experts, check_offs_values
from fp8moe.config import ActivationStorage, FP8Config, KernelPreference, ScaleFormat, check_config
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenOperand
from fp8moe.quantize import (
    dequantize_rows,
    quantize_rows,
    quantize_rows_and_tokens,
    quantize_tokens,
)
from fp8moe.quantize.swiglu_backward import SwiGLUGradients, quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import quantize_swiglu, quantize_swiglu_and_measure
from fp8moe.quantize.weight_cache import WeightCache
from fp8moe.rows.choices import at_choices, at_rows
from fp8moe.rows.combine import combine
from fp8moe.rows.groups import ends_within, plan_groups
from fp8moe.rows.routing import Routing

Weight = Tensor | tuple[Tensor, Tensor]
"""`w_gate_up` `(E, 2I, H)`, or `w_gate` and `w_up`, `(E, I, H)` each."""
Pair = tuple[Tensor | None, Tensor | None]
NOTHING: Pair = (None, None)


def swiglu_experts(
    a: Tensor,
    w_gate_up: Weight,
    w_down: Tensor,
    offs: Tensor,
    row_weights: Tensor | None = None,
    *,
    config: FP8Config = DEFAULT_CONFIG,
    main_grads: Pair = NOTHING,
    weight_caches: tuple[WeightCache | None, WeightCache | None] = (None, None),
) -> Tensor:
    """Each group's rows through its own SwiGLU MLP: `w_down @ (silu(w_gate @ x) * (w_up @ x) * weight)`.

    Between the GEMMs nothing is stored in high precision but `(M, 2I)`, from which SwiGLU, its gradient and every
    operand are computed; for backward it saves that (in BF16, or FP8: `FP8Config.activation_storage`) and `a` in FP8.

    Args:
        a: `(M, H)` bf16, fp16 or fp32, any strides, the rows of each group together; `H` a multiple of 128.
        w_gate_up: `(E, 2I, H)`, the gate's rows first, or the pair `(w_gate, w_up)`, `(E, I, H)` each, which is never
            joined in high precision; `I` a multiple of 128.
        w_down: `(E, H, I)`.
        offs: int32 `(E,)`, as in `grouped_mm`; rows from `offs[-1]` on come out as zeros, with zero gradients.
        row_weights: any float dtype `(M,)`: scales each row's activation. Its gradient costs no extra pass.
        config: backend, scale format, storage and checks.
        main_grads: fp32 `(E, 2I, H)` and `(E, H, I)`, contiguous: the weight gradients are added to them in place, and
            the weights get none. Either may be None. Not with separate `w_gate` and `w_up` for the first.
        weight_caches: of `w_gate_up` and `w_down`; either may be None. Not with separate `w_gate` and `w_up` for the
            first.

    Returns:
        `(M, H)`, in the dtype of `a`, under autocast in the autocast dtype. It can be differentiated once.

    Raises:
        TypeError: an argument is not of the right type or dtype.
        ValueError: an argument has the wrong rank, shape or device, or a size is not a multiple of 128.
        BackendUnavailableError: `config.kernel_preference` names a backend that cannot be used here.
    """
    check_config(config)
    check_experts(a, w_gate_up, w_down, offs, row_weights, main_grads, weight_caches)
    if config.debug:
        check_offs_values(offs, a.shape[0])
    backends = _backends(a, w_down, a.shape[0], config, weight_caches)
    if not backends:
        return _in_bf16(a, w_gate_up, w_down, ends_within(offs, a.shape[0]), row_weights, main_grads)
    groups = plan_groups(offs, a.shape[0])
    return _in_fp8(a, w_gate_up, w_down, row_weights, groups, None, backends, config, main_grads, weight_caches)


def routed_experts(
    hidden: Tensor, routing: Routing, topk_weights: Tensor, w_gate_up: Weight, w_down: Tensor,
    config: FP8Config, main_grads: Pair, weight_caches: tuple[WeightCache | None, WeightCache | None],
) -> Tensor:  # fmt: skip
    """`(T, H)` to `(T, H)`: the rows are gathered from the tokens as they are quantized, and summed where they end."""
    backends = _backends(hidden, w_down, topk_weights.numel(), config, weight_caches)
    if backends:
        groups = routing.groups
        return _in_fp8(
            hidden, w_gate_up, w_down, topk_weights, groups, routing, backends, config, main_grads, weight_caches
        )
    # A row of no choice copies the first token: its output is zeros, and so is its gradient.
    padded_row = routing.groups.token_row.clamp(min=0)
    row = routing.choice_row.flatten()
    skipped = torch.full_like(row, row.numel())  # past the last
    weights = topk_weights.new_zeros(row.numel() + 1).scatter(
        0, torch.where(row < 0, skipped, row).long(), topk_weights.flatten()
    )[:-1]
    rows = hidden[routing.row_token[padded_row].clamp(min=0)]
    out = _in_bf16(rows, w_gate_up, w_down, routing.groups.ends, weights, main_grads)
    chosen = out[routing.choice_row.clamp(min=0)]  # (T, k, H)
    return chosen.masked_fill((routing.choice_row < 0)[:, :, None], 0.0).sum(1).to(out.dtype)


def _backends(
    x: Tensor, w_down: Tensor, num_rows: int, config: FP8Config,
    weight_caches: tuple[WeightCache | None, WeightCache | None],
) -> list[KernelPreference]:  # fmt: skip
    """Both weights go one way: their token operands have one layout. Cached are both or neither."""
    num_experts, hidden_size, intermediate_size = w_down.shape
    cached = weight_caches[0] is not None and weight_caches[1] is not None
    sizes = (num_rows, hidden_size, intermediate_size, num_experts)
    return backends_for(config, x.device, sizes, layer=True, cached=cached)


def _in_bf16(
    a: Tensor, w_gate_up: Weight, w_down: Tensor, ends: Tensor, row_weights: Tensor | None, main_grads: Pair
) -> Tensor:
    """What AUTO runs where FP8 does not pay."""
    main_gate_up, main_down = (None if grad is None else grad.transpose(1, 2) for grad in main_grads)
    if isinstance(w_gate_up, Tensor):
        both = grouped_mm_in_bf16(a, w_gate_up.transpose(1, 2), ends, main_gate_up)
        gate, up = both.chunk(2, dim=1)
    else:
        gate, up = (grouped_mm_in_bf16(a, w.transpose(1, 2), ends, None) for w in w_gate_up)
    activation = F.silu(gate) * up
    if row_weights is not None:
        activation = activation * row_weights.to(activation.dtype)[:, None]
    return grouped_mm_in_bf16(activation, w_down.transpose(1, 2), ends, main_down)


def _in_fp8(
    x: Tensor, w_gate_up: Weight, w_down: Tensor, weights: Tensor | None, groups: TokenGroups, routing: Routing | None,
    backends: list[KernelPreference], config: FP8Config, main_grads: Pair,
    weight_caches: tuple[WeightCache | None, WeightCache | None],
) -> Tensor:  # fmt: skip
    w_gate, w_up = (w_gate_up, None) if isinstance(w_gate_up, Tensor) else w_gate_up
    cached: list[Tensor | None] = []
    for cache, weight in zip(weight_caches, (w_gate, w_down), strict=True):
        cached += NOT_CACHED if cache is None else cached_tensors(cache, weight.detach(), config.scale_format)
    # Within Function.forward grad mode is always off: whether there will be a backward is known only here.
    inputs = (x, w_gate, w_up, w_down, weights)
    needs_grad = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    route = [None] * 2 if routing is None else [routing.row_token, routing.choice_row]
    return _FP8Experts.apply(
        *inputs, groups.num_rows, backends, config.scale_format, config.activation_storage, config.wgrad_token_tile,
        output_dtype(x), needs_grad, *groups.tensors, *route, *main_grads, *cached,
    )  # fmt: skip


class _FP8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, weights: Tensor | None,
        num_rows: int, backends: list[KernelPreference], scale_format: ScaleFormat, storage: ActivationStorage,
        token_tile: int, out_dtype: torch.dtype, needs_grad: list[bool], *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # One by one, because torch.compile takes no lists of tensors here.
        plan, route, main_grads, cached = tensors[:5], tensors[5:7], tensors[7:9], tensors[9:]
        forward, _, wgrad = (BACKENDS[backend] for backend in backends)
        groups = TokenGroups(num_rows, *plan)  # type: ignore[arg-type]
        row_token, choice_row = route
        gathered = groups.gathering(row_token)
        x_tokens: list[Tensor | None] = [None, None]
        if needs_grad[1] or needs_grad[2]:
            rows, tokens = quantize_rows_and_tokens(x, gathered, scale_format, wgrad.token_layout, token_tile)
            x_tokens = [*tokens.tensors]  # as stored: a hook that moves it away loses its strides
        else:
            rows = quantize_rows(x, gathered, scale_format)
        gate_up = forward.m_grouped(
            rows, forward_operand(_parts(w_gate, w_up), cached[0], cached[2], scale_format), groups, torch.bfloat16
        )  # (M, 2I)
        row_weights = weights if weights is None or choice_row is None else at_rows(weights, choice_row)
        activation: RowOperand | None
        act_tiles = None
        if needs_grad[3] and token_tile > BLOCK:
            activation, act_tiles = quantize_swiglu_and_measure(
                gate_up, groups, scale_format, token_tile, row_weights=row_weights
            )
        else:
            activation, _ = quantize_swiglu(gate_up, groups, scale_format, row_weights=row_weights)
        out = forward.m_grouped(
            cast(RowOperand, activation), forward_operand(w_down, cached[3], cached[5], scale_format), groups,
            out_dtype if choice_row is None else torch.bfloat16,
        )  # (M, H)  # fmt: skip

        saved_gate_up: list[Tensor] = []
        if any(needs_grad):
            saved_gate_up = [gate_up] if storage is ActivationStorage.BF16 else _compressed(gate_up, groups)
        needs_x, needs_gate, needs_up, _, needs_weights = needs_grad
        saved_w_gate_up: list[Tensor | None] = [w_gate, w_up] if needs_x else [None, None]
        saved_w_down = w_down if needs_x or needs_gate or needs_up or needs_weights else None
        ctx.save_for_backward(
            *saved_w_gate_up, saved_w_down, row_weights, *_dgrad_tensors(cached), *plan, *route,
            *x_tokens, act_tiles and act_tiles.amax, *saved_gate_up,
        )  # fmt: skip
        ctx.num_rows, ctx.backends, ctx.scale_format, ctx.token_tile = num_rows, backends, scale_format, token_tile
        ctx.needs_grad, ctx.x_dtype, ctx.is_joined = needs_grad, x.dtype, w_up is None
        ctx.w_gate_up_dtype, ctx.w_down_dtype = w_gate.dtype, w_down.dtype
        ctx.weights_dtype = None if weights is None else weights.dtype
        ctx.main_grads = main_grads  # not saved: one backward changes them, and others may follow
        return out if choice_row is None else combine(out, choice_row, out_dtype)

    @staticmethod
    @differentiable_once("fp8moe.swiglu_experts")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _, dgrad, wgrad = (BACKENDS[backend] for backend in ctx.backends)
        w_gate, w_up, w_down, row_weights, *rest = ctx.saved_tensors
        cached, plan, route, x_tokens, act_amax, saved_gate_up = (
            rest[:4], rest[4:9], rest[9:11], rest[11:13], rest[13], rest[14:],
        )  # fmt: skip
        act_tiles = None if act_amax is None else LongTiles(ctx.token_tile, act_amax)
        row_token, choice_row = route
        groups = TokenGroups(ctx.num_rows, *plan)
        gathered = groups.gathering(row_token)
        needs_x, needs_gate, needs_up, needs_down, needs_weights = ctx.needs_grad
        needs_gate_up = needs_gate or needs_up
        needs_d_act = needs_x or needs_gate_up or needs_weights
        layout, scale_format = wgrad.token_layout, ctx.scale_format

        dout_rows = dout_tokens = None
        if needs_d_act and needs_down:
            dout_rows, dout_tokens = quantize_rows_and_tokens(dout, gathered, scale_format, layout)
        elif needs_d_act:
            dout_rows = quantize_rows(dout, gathered, scale_format)
        elif needs_down:
            dout_tokens = quantize_tokens(dout, gathered, scale_format, layout)

        if len(saved_gate_up) == 1:
            (gate_up,) = saved_gate_up
        else:
            gate_up = dequantize_rows(RowOperand(*saved_gate_up), groups, torch.bfloat16)
        # In this order, and each operand dropped with its last use, memory peaks at the dgrad of gate and up alone.
        made = SwiGLUGradients(None, None, None, None)
        if dout_rows is not None:
            weight = dgrad_operand(w_down, cached[2], cached[3], scale_format)
            d_activation = dgrad.m_grouped(dout_rows, weight, groups, torch.bfloat16)  # (M, I)
            del dout_rows, weight
            made = quantize_swiglu_backward(
                d_activation, gate_up, groups, scale_format,
                d_x_rows=needs_x, d_x_tokens=needs_gate_up, act_tokens=needs_down, d_row_weights=needs_weights,
                layout=layout, row_weights=row_weights, long_tiles=act_tiles,
            )  # fmt: skip
            del d_activation
        elif needs_down:
            _, tokens = quantize_swiglu(
                gate_up, groups, scale_format,
                rows=False, tokens=layout, row_weights=row_weights, long_tiles=act_tiles,
            )  # fmt: skip
            made = replace(made, act_tokens=tokens)
        d_x_rows, d_x_tokens, act_tokens, d_weights = (
            made.d_x_rows, made.d_x_tokens, made.act_tokens, made.d_row_weights,
        )  # fmt: skip
        del made, gate_up

        dx = d_gate = d_up = d_down = None
        if dout_tokens is not None and act_tokens is not None:
            d_down = _wgrad(wgrad, dout_tokens, act_tokens, groups, ctx.w_down_dtype, ctx.main_grads[1])
            del dout_tokens, act_tokens
        if d_x_rows is not None:
            weight = dgrad_operand(_parts(w_gate, w_up), cached[0], cached[1], scale_format)
            dx = dgrad.m_grouped(d_x_rows, weight, groups, ctx.x_dtype if choice_row is None else torch.bfloat16)
            del d_x_rows, weight
            if choice_row is not None:
                dx = combine(dx, choice_row, ctx.x_dtype)  # (M, H) to (T, H)
        if d_x_tokens is not None:
            operand = TokenOperand.of(x_tokens, layout, ctx.token_tile)
            d_gate_up = _wgrad(wgrad, d_x_tokens, operand, groups, ctx.w_gate_up_dtype, ctx.main_grads[0])
            if ctx.is_joined or d_gate_up is None:
                d_gate = d_gate_up
            else:
                d_gate, d_up = d_gate_up.chunk(2, dim=1)
        if d_weights is not None:
            d_weights = d_weights if choice_row is None else at_choices(d_weights, choice_row)
            d_weights = d_weights.to(ctx.weights_dtype)
        return dx, d_gate, d_up if needs_up else None, d_down, d_weights, *[None] * 22


def _parts(w_gate: Tensor, w_up: Tensor | None) -> list[Tensor]:
    return [w_gate] if w_up is None else [w_gate, w_up]


def _dgrad_tensors(cached: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What backward needs of `cached`: data and scale of each weight."""
    return [cached[1], cached[2], cached[4], cached[5]]


def _wgrad(
    backend: Any, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, dtype: torch.dtype,
    main_grad: Tensor | None,
) -> Tensor | None:  # fmt: skip
    if main_grad is None:
        gradient: Tensor = backend.k_grouped(lhs, rhs, groups, dtype)
        return gradient
    backend.k_grouped_add(lhs, rhs, groups, main_grad)
    return None


def _compressed(gate_up: Tensor, groups: TokenGroups) -> list[Tensor]:
    """`(M, 2I)` in FP8: data and stored scales."""
    return [*quantize_rows(gate_up, groups, ScaleFormat.FP32).tensors]
