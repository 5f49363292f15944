"""Experts on several ranks whose rows travel in BF16: what arrives are tokens of the rank, and its experts compute as
they do alone.

Shapes: as in `plan.py`.
"""

from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.experts import routed_experts
from fp8moe.autograd.mlp_weights import MlpWeights
from fp8moe.autograd.once import differentiable_once
from fp8moe.config import FP8Config
from fp8moe.distributed.in_fp8 import OPERATION
from fp8moe.distributed.plan import Departure, DispatchPlan
from fp8moe.rows.combine import combine
from fp8moe.rows.part_sums import sums_at_choices


def ep_in_bf16(
    hidden: Tensor, weights: Tensor, mlp: MlpWeights, down_bias: Tensor | None, depart: Departure, config: FP8Config
) -> Tensor:
    """`(T, H)` to `(T, H)`, with the router's `weights` `(T, k)`; `depart` lets their messages leave."""
    with torch.no_grad():
        dispatch = depart()
    tokens, arrived_weights, ids = _There.apply(hidden, weights, dispatch)
    out = routed_experts(tokens, ids, arrived_weights, mlp, down_bias, config, dispatch.num_rows)
    return _Back.apply(out, dispatch, output_dtype(hidden), down_bias is not None)


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, dispatch: DispatchPlan) -> tuple[Tensor, Tensor, Tensor]:
        arrived, ids = dispatch.arrive()
        ids = ids.contiguous()
        ctx.save_for_backward(dispatch.token_slot, dispatch.choice_place)
        ctx.traffic, ctx.x_dtype, ctx.weights_dtype = dispatch.traffic, x.dtype, weights.dtype
        tokens = arrived.values
        ctx.mark_non_differentiable(ids, *(() if ctx.needs_input_grad[0] else (tokens,)))
        return tokens, arrived.weights.contiguous(), ids  # (N, H), (N, k) twice

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, d_tokens: Tensor, d_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        token_slot, choice_place = ctx.saved_tensors
        d_x = made = None
        if ctx.needs_input_grad[0]:
            d_x = combine(ctx.traffic.rows_back(d_tokens.contiguous()).wait(), token_slot, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            home = ctx.traffic.rows_back(d_weights.contiguous()).wait()  # (S, k): in one part
            made = sums_at_choices(home.view(1, -1), choice_place).to(ctx.weights_dtype)
        return d_x, made, None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, dispatch: DispatchPlan, out_dtype: torch.dtype, sums_all: bool
    ) -> Tensor:  # fmt: skip
        ctx.sums_all = sums_all  # whether the gradient of a bias sums the gradients of all messages
        ctx.save_for_backward(dispatch.token_slot)
        ctx.traffic = dispatch.traffic
        back = dispatch.traffic.rows_back(out.contiguous()).wait()  # (N, H) to (S, H)
        return combine(back, dispatch.token_slot, out_dtype)  # (T, H)

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (token_slot,) = ctx.saved_tensors
        arriving = ctx.traffic.send_gradient(dout, token_slot, in_fp8=False, clear=ctx.sums_all)
        return arriving.wait().values, None, None, None
