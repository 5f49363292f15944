"""The expert MLP in BF16, which AUTO runs where FP8 does not pay: PyTorch's products, and one pass for all in between.

Behind a router there are rows of no choice where choices are skipped, as many as those: only the device knows. Nothing
reads them into a result: products leave out what is past the last group, and all else goes from choice to choice. So
they may hold anything, and nothing need write them.
"""

from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.grouped_mm_in_bf16 import grouped_mm_in_bf16
from fp8moe.autograd.mlp_weights import MlpWeights, expert_weights_of_rows
from fp8moe.autograd.once import differentiable_once
from fp8moe.quantize.gated_in_bf16 import gated_in_bf16, gated_in_bf16_backward
from fp8moe.rows.combine import combine
from fp8moe.rows.routing import Routing
from fp8moe.rows.spread import spread


def experts_in_bf16(
    a: Tensor, mlp: MlpWeights, ends: Tensor, weights: Tensor | None, out_dtype: torch.dtype,
    *, choice_row: Tensor | None = None, zero_unused: bool,
) -> Tensor:  # fmt: skip
    """`(M, H)` from `a` `(M, H)`.

    As in FP8, gate and up are BF16 whatever the dtype of `a`: fp16 would overflow where an activation is larger than
    65504. A router's weights are not rounded.

    Args:
        a, mlp: as in `swiglu_experts`.
        ends, zero_unused: as in `grouped_mm_in_bf16`.
        weights: of rows `(M,)`, or with a `choice_row` of choices `(T, k)`.
        choice_row: of `Routing`: no other rows are used.
        out_dtype: of the result.
    """
    main_gate_up, main_down = (None if grad is None else grad.transpose(1, 2) for grad in mlp.main_grads)
    first = (mlp.w_gate_up,) if isinstance(mlp.w_gate_up, Tensor) else mlp.w_gate_up
    parts = tuple(
        grouped_mm_in_bf16(a, w.transpose(1, 2), ends, main_gate_up, torch.bfloat16, zero_unused=zero_unused)
        for w in first
    )  # (M, 2I), or (M, I) each
    if mlp.act.bias is not None:
        parts = (_biased(parts, mlp.act.bias, ends),)
    act = mlp.act
    values = _Activation.apply(
        weights, choice_row, act.gate.code, act.interleaved, act.bias is not None, *parts
    )  # (M, I)
    return grouped_mm_in_bf16(values, mlp.w_down.transpose(1, 2), ends, main_down, out_dtype, zero_unused=zero_unused)


def routed_experts_in_bf16(hidden: Tensor, routing: Routing, topk_weights: Tensor, mlp: MlpWeights) -> Tensor:
    """`(T, H)` to `(T, H)`."""
    choice_row = routing.choice_row
    rows = _Spread.apply(hidden, choice_row)  # (M, H)
    out = experts_in_bf16(
        rows, mlp, routing.groups.ends, topk_weights, torch.bfloat16, choice_row=choice_row, zero_unused=False
    )
    return _Combine.apply(out, choice_row, output_dtype(hidden))


def _biased(parts: tuple[Tensor, ...], bias: Tensor, ends: Tensor) -> Tensor:
    """`(M, 2I)`."""
    both = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return both + expert_weights_of_rows(ends, both.shape[0], None).to(bias.dtype) @ bias


OPERATION = "fp8moe.swiglu_experts"


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, choice_row: Tensor) -> Tensor:
        ctx.save_for_backward(choice_row)
        ctx.dtype = hidden.dtype
        return spread(hidden, choice_row, torch.bfloat16)

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        (choice_row,) = ctx.saved_tensors
        return combine(d_rows, choice_row, ctx.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, choice_row: Tensor, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(choice_row)
        return combine(rows, choice_row, out_dtype)

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (choice_row,) = ctx.saved_tensors
        return spread(dout, choice_row, torch.bfloat16), None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor | None, choice_row: Tensor | None, gate: str, interleaved: bool, has_bias: bool,
        *parts: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weights, choice_row, *parts)
        ctx.gate, ctx.interleaved, ctx.has_bias = gate, interleaved, has_bias
        return gated_in_bf16(parts, weights, choice_row, gate, interleaved)

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, d_act: Tensor) -> tuple[Tensor | None, ...]:
        weights, choice_row, *parts = ctx.saved_tensors
        # The gradient of a bias is a sum of all rows, in which unused ones count zero times what they hold.
        made = gated_in_bf16_backward(d_act, parts, weights, choice_row, ctx.gate, ctx.interleaved, ctx.has_bias)
        d_parts, d_weights = made[: len(parts)], None
        if weights is not None and ctx.needs_input_grad[0]:
            d_weights = made[-1].to(weights.dtype)
        return d_weights, None, None, None, None, *d_parts
