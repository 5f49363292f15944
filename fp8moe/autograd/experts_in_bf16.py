"""The expert MLP in BF16, which AUTO runs where FP8 does not pay: PyTorch's products, and one pass for all in between.

Behind a router there are rows of no choice where choices are skipped, as many as those: only the device knows. Nothing
reads them into a result: products leave out what is past the last group, and all else goes from choice to choice. So
they may hold anything, and nothing need write them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.main_grad import is_wanted, nothing_for, with_main_grad
from fp8moe.autograd.mlp_weights import MlpWeights, expert_weights_of_rows, is_stored_transposed
from fp8moe.autograd.once import differentiable_once
from fp8moe.devices import runs_triton
from fp8moe.gemm.bf16 import k_grouped_add_bf16, k_grouped_bf16, m_grouped_bf16
from fp8moe.quantize.gated_in_bf16 import gated_in_bf16, gated_in_bf16_backward
from fp8moe.rows.combine import combine
from fp8moe.rows.spread import spread
from fp8moe.torch_op import is_observed


def experts_in_bf16(
    x: Tensor, mlp: MlpWeights, ends: Tensor, weights: Tensor | None, choice_row: Tensor | None, *, zero_unused: bool
) -> Tensor:  # fmt: skip
    """`(M, H)` from rows `(M, H)`, or with a `choice_row` `(T, H)` from tokens `(T, H)`; in `output_dtype`.

    As in FP8, gate and up are BF16 whatever the dtype of `x`: fp16 would overflow where an activation is larger than
    65504. A router's weights are not rounded.

    Args:
        x, mlp: as in `swiglu_experts` or `moe_forward`.
        ends: int32 `(E,)`, non-decreasing, at most `M`; not checked.
        weights: of rows `(M,)`, or with a `choice_row` of choices `(T, k)`.
        choice_row: of `Routing`: no other rows are used.
        zero_unused: without a `choice_row`: whether rows from `ends[-1]` on are zeros in the result and in the
            gradients of `x` and `weights`. Else they are unspecified, as nobody reads them, or there are none.
    """
    w_gate, w_up = (mlp.w_gate_up, None) if isinstance(mlp.w_gate_up, Tensor) else mlp.w_gate_up
    w_down, act, (main_gate_up, main_down) = mlp.w_down, mlp.act, mlp.main_grads
    if main_gate_up is not None or main_down is not None:
        w_gate, w_down = with_main_grad(w_gate, main_gate_up), with_main_grad(w_down, main_down)
    return _ExpertsInBF16.apply(
        x, w_gate, w_up, w_down, weights, act.bias, choice_row, ends, act.gate.code, act.interleaved, zero_unused,
        main_gate_up, main_down,
    )  # fmt: skip


OPERATION = "fp8moe.swiglu_experts"


class _ExpertsInBF16(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, weights: Tensor | None,
        bias: Tensor | None, choice_row: Tensor | None, ends: Tensor, gate: str, interleaved: bool, zero_unused: bool,
        main_grad_gate_up: Tensor | None, main_grad_down: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.is_plain, second = False, None
        if (
            w_up is None and bias is None and weights is not None and choice_row is not None
            and _is_plain_layer(x, w_gate, w_down, weights)
        ):  # fmt: skip
            from fp8moe.gemm.plain_layer import layer_forward

            ctx.is_plain = main_grad_gate_up is None and main_grad_down is None
            out, rows, first, act = layer_forward(x, w_gate, w_down, weights, choice_row, ends, gate, interleaved)
        else:
            out, rows, first, second, act = _forward(
                x, w_gate, w_up, w_down, weights, bias, choice_row, ends, gate, interleaved, zero_unused
            )
        wants_x, wants_gate, wants_up, wants_down, wants_weights, wants_bias = ctx.needs_input_grad[:6]
        wants_parts = wants_x or wants_gate or wants_up or wants_weights or wants_bias
        ctx.save_for_backward(
            rows if wants_gate or wants_up else None, w_gate if wants_x else None, w_up if wants_x else None,
            w_down if wants_parts else None, weights, first if wants_parts else None, second if wants_parts else None,
            act if wants_down else None, choice_row, ends,
        )  # fmt: skip
        ctx.gate, ctx.interleaved, ctx.zero_unused = gate, interleaved, zero_unused
        ctx.gate_is_transposed, ctx.down_is_transposed = is_stored_transposed(w_gate), is_stored_transposed(w_down)
        ctx.up_is_transposed = w_up is not None and is_stored_transposed(w_up)
        ctx.x_dtype, ctx.gate_dtype, ctx.down_dtype = x.dtype, w_gate.dtype, w_down.dtype
        ctx.up_dtype, ctx.bias_dtype = None if w_up is None else w_up.dtype, None if bias is None else bias.dtype
        # Not saved: one backward changes them while others wait.
        ctx.main_grads = main_grad_gate_up, main_grad_down
        return out

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.is_plain or is_observed(dout):
            return _backward(ctx, dout)
        from fp8moe.gemm.plain_layer import layer_backward

        rows, w_gate_up, _, w_down, weights, gate_up, _, act, choice_row, ends = ctx.saved_tensors
        dx, d_gate_up, d_down, d_weights = layer_backward(
            dout, rows, w_gate_up, w_down, weights, gate_up, act, choice_row, ends, ctx.gate, ctx.interleaved,
            ctx.gate_is_transposed, ctx.down_is_transposed, ctx.needs_input_grad[4],
        )  # fmt: skip
        if d_weights is not None and weights.dtype is not torch.float32:
            d_weights = d_weights.to(weights.dtype)
        return dx, d_gate_up, None, d_down, d_weights, None, None, None, None, None, None, None, None


def _is_plain_layer(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor) -> bool:
    if is_observed(x) or not runs_triton(x.device):
        return False
    from fp8moe.gemm.plain_layer import is_plain

    return is_plain(x, w_gate_up, w_down, weights)


def _forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, weights: Tensor | None, bias: Tensor | None,
    choice_row: Tensor | None, ends: Tensor, gate: str, interleaved: bool, zero_unused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The output, the rows `(M, H)`, their gate and up, with the bias, `(M, 2I)` or `(M, I)` each, and activation."""
    rows = x if choice_row is None else spread(x, choice_row, torch.bfloat16)
    parts = [
        m_grouped_bf16(rows, w.transpose(1, 2), ends, torch.bfloat16, zero_unused)
        for w in ((w_gate,) if w_up is None else (w_gate, w_up))
    ]
    if bias is not None:
        both = parts[0] if w_up is None else torch.cat(parts, dim=1)
        parts = [both + expert_weights_of_rows(ends, both.shape[0], None).to(bias.dtype) @ bias]
    act = gated_in_bf16(parts, weights, choice_row, gate, interleaved)
    out_dtype = output_dtype(x)
    out = m_grouped_bf16(
        act, w_down.transpose(1, 2), ends, out_dtype if choice_row is None else torch.bfloat16, zero_unused
    )
    if choice_row is not None:
        out = combine(out, choice_row, out_dtype)
    return out, rows, parts[0], parts[1] if len(parts) == 2 else None, act


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, w_gate, w_up, w_down, weights, first, second, act, choice_row, ends = ctx.saved_tensors
    main_grad_gate_up, main_grad_down = ctx.main_grads
    wants_x, wants_gate, wants_up, wants_down, wants_weights, wants_bias = ctx.needs_input_grad[:6]
    wants_gate = wants_gate and (main_grad_gate_up is None or is_wanted(ctx, 1))
    has_pair = ctx.up_dtype is not None
    number_of_down = 3 if has_pair else 2
    wants_down = wants_down and (main_grad_down is None or is_wanted(ctx, number_of_down))

    d_out = dout if choice_row is None else spread(dout, choice_row, torch.bfloat16)
    dx = d_gate = d_up = d_down = d_weights = d_bias = None
    if wants_down:
        d_down = _weight_gradient(d_out, act, ends, ctx.down_dtype, ctx.down_is_transposed, main_grad_down)
    if wants_x or wants_gate or wants_up or wants_weights or wants_bias:
        d_act = m_grouped_bf16(d_out, w_down, ends, torch.bfloat16, ctx.zero_unused)
        parts = [first] if second is None else [first, second]
        # The gradient of a bias is a sum of all rows, in which unused ones count zero times what they hold.
        made = gated_in_bf16_backward(d_act, parts, weights, choice_row, ctx.gate, ctx.interleaved, wants_bias)
        d_parts: Sequence[Tensor] = made[: len(parts)]
        if wants_weights:
            d_weights = made[-1].to(weights.dtype)
        if ctx.bias_dtype is not None:
            (d_both,) = d_parts
            if wants_bias:
                of_rows = expert_weights_of_rows(ends, d_both.shape[0], None).to(d_both.dtype)
                d_bias = (of_rows.t() @ d_both).to(ctx.bias_dtype)
            d_parts = d_both.chunk(2, dim=1) if has_pair else (d_both,)
        if wants_gate:
            d_gate = _weight_gradient(d_parts[0], rows, ends, ctx.gate_dtype, ctx.gate_is_transposed, main_grad_gate_up)
        if wants_up:
            d_up = _weight_gradient(d_parts[1], rows, ends, ctx.up_dtype, ctx.up_is_transposed, None)
        if wants_x:
            rows_dtype = ctx.x_dtype if choice_row is None else torch.bfloat16
            dx = m_grouped_bf16(d_parts[0], w_gate, ends, rows_dtype, ctx.zero_unused)
            if w_up is not None:
                dx = dx + m_grouped_bf16(d_parts[1], w_up, ends, rows_dtype, ctx.zero_unused)
            if choice_row is not None:
                dx = combine(dx, choice_row, ctx.x_dtype)
    if main_grad_gate_up is not None:
        d_gate = nothing_for(ctx, 1, main_grad_gate_up, ctx.gate_dtype)
    if main_grad_down is not None:
        d_down = nothing_for(ctx, number_of_down, main_grad_down, ctx.down_dtype)
    return dx, d_gate, d_up, d_down, d_weights, d_bias, None, None, None, None, None, None, None


def _weight_gradient(
    d_out: Tensor, rows: Tensor, ends: Tensor, dtype: torch.dtype, transposed: bool, main_grad: Tensor | None
) -> Tensor | None:  # fmt: skip
    """`(E, N, K)`, in the layout of a weight that is stored `(E, K, N)` if `transposed`, or None after adding it."""
    if main_grad is not None:
        k_grouped_add_bf16(d_out, rows, ends, main_grad)
        return None
    if transposed:
        return k_grouped_bf16(rows, d_out, ends, dtype).transpose(1, 2)
    return k_grouped_bf16(d_out, rows, ends, dtype)
