"""Experts on several ranks whose rows travel in FP8: one autograd function, because between two of them a gradient
could only be passed on in the dtype of its tensor.

Shapes: as in `plan.py`; `M` rows of this rank's experts, `H` and `I` features.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.expert_mlp import Experts, Operands, Plan, experts_backward, experts_forward
from fp8moe.autograd.experts import (
    Inputs,
    Saved,
    backends_of_layer,
    expert_weight,
    gradients_of_inputs,
    inputs_of,
    plan_of,
    without_main_grads_that_nobody_asks_for,
)
from fp8moe.autograd.mlp_weights import MlpWeights, add_down_bias, expert_weights_of_tokens
from fp8moe.autograd.once import differentiable_once
from fp8moe.config import FP8Config
from fp8moe.distributed.plan import DispatchPlan, Traffic, at_choices
from fp8moe.operands import RowOperand, TokenGroups
from fp8moe.quantize.messages import dequantize, unpack_operands
from fp8moe.quantize.weight_source import handle_after_use
from fp8moe.rows.combine import combine
from fp8moe.rows.part_sums import sums_at_choices
from fp8moe.rows.routing import Routing

OPERATION = "fp8moe.distributed.ep_moe_forward"


def ep_in_fp8(
    hidden: Tensor, weights: Tensor, mlp: MlpWeights, down_bias: Tensor | None, dispatch: DispatchPlan,
    config: FP8Config,
) -> Tensor:  # fmt: skip
    """`(T, H)` to `(T, H)`, with the router's `weights` `(T, k)`, of which `dispatch` has the messages."""
    backends = backends_of_layer(hidden, mlp, dispatch.num_rows, config)
    if backends is None:
        raise RuntimeError("config.allow_bf16 must be False here")
    inputs = inputs_of(hidden, mlp, weights)
    plan = plan_of(inputs, mlp, dispatch.num_rows, torch.bfloat16, backends, config)
    return _DispatchedExperts.apply(
        *inputs, down_bias, plan, dispatch, output_dtype(hidden), *mlp.main_grads, *mlp.handles
    )


class _DispatchedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, weights: Tensor, bias: Tensor | None,
        down_bias: Tensor | None, plan: Plan, dispatch: DispatchPlan, out_dtype: torch.dtype,
        main_grad_gate_up: Tensor | None, main_grad_down: Tensor | None, handle_gate_up: Tensor | None,
        handle_down: Tensor | None,
    ) -> Tensor:  # fmt: skip
        traffic, wanted = dispatch.traffic, plan.wanted
        arrived, ids = dispatch.arrive()  # N
        routing = Routing.from_topk(ids, w_down.shape[0], arrived.weights).first_rows(plan.num_rows)
        groups = routing.groups
        rows, tokens = unpack_operands(
            arrived, groups.gathering(routing.row_token),
            rows=True, tokens=plan.token_layout if wanted.w_gate_up else None, token_tile=plan.token_tile,
        )  # fmt: skip
        biased = None if down_bias is None else _Biased(ids.clone(), arrived.weights.clone(), down_bias)
        del arrived, ids
        experts = Experts(
            groups, expert_weight(w_gate, w_up, handle_gate_up, plan.split), expert_weight(w_down, None, handle_down),
            routing.row_weights, bias,
        )  # fmt: skip
        out, gate_up, kept = experts_forward(cast(RowOperand, rows), experts, plan, torch.bfloat16)  # (M, H)

        inputs = Inputs(x, w_gate, w_up, w_down, weights, bias)
        handles = (handle if handle is None else handle_after_use(handle) for handle in (handle_gate_up, handle_down))
        saved = Saved.of(inputs, kept, experts.row_weights, Operands(tokens=tokens), gate_up, wanted)
        maps = (*groups.tensors, routing.row_token, routing.choice_row, dispatch.token_slot, dispatch.choice_slot)
        ctx.save_for_backward(*saved, *maps, *handles, *(biased or ()))
        ctx.plan, ctx.traffic = plan, traffic
        ctx.has_pair, ctx.x_dtype = w_up is not None, x.dtype
        ctx.weights_dtype, ctx.bias_dtype = weights.dtype, None if bias is None else bias.dtype
        ctx.has_down_bias = down_bias is not None
        ctx.main_grads = main_grad_gate_up, main_grad_down
        del rows, tokens, gate_up, saved
        sums = combine(out, routing.choice_row, torch.bfloat16)  # (N, H)
        back = traffic.back(sums if biased is None else biased.added_to(sums))  # (S, H)
        return combine(back, dispatch.token_slot, out_dtype)  # (T, H)

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan, traffic = without_main_grads_that_nobody_asks_for(ctx), cast(Traffic, ctx.traffic)
        wanted, tensors, count = plan.wanted, ctx.saved_tensors, len(Saved._fields)
        saved = Saved(*tensors[:count])
        biased = _Biased(*tensors[-3:]) if ctx.has_down_bias else None
        *plan_tensors, row_token, choice_row, token_slot, choice_slot, handle_gate_up, handle_down = tensors[
            count : -3 if biased else None
        ]
        groups = TokenGroups(plan.num_rows, *plan_tensors)

        arrived = traffic.gradient_there(dout, token_slot, in_fp8=True, clear=ctx.has_down_bias)
        d_out = Operands(
            *unpack_operands(
                arrived, groups.gathering(row_token),
                rows=wanted.d_activation, tokens=plan.token_layout if wanted.w_down else None,
            )
        )  # fmt: skip
        kept = saved.kept()
        experts = Experts(
            groups, expert_weight(saved.w_gate, saved.w_up, handle_gate_up, plan.split, kept.gate_up),
            expert_weight(saved.w_down, None, handle_down, kept=kept.down), saved.row_weights, saved.bias,
        )  # fmt: skip
        x, gate_up = saved.x_operands(plan, groups, row_token, choice_row), saved.gate_and_up(plan)
        d_down_bias = d_own_weights = None
        if biased:
            d_own_weights, d_down_bias = biased.gradients(dequantize(arrived).bfloat16())
        del arrived, tensors, saved, kept

        def sent_back(d_rows: Tensor) -> Tensor:
            back = traffic.back(combine(d_rows, choice_row, torch.bfloat16))  # (M, H) to (N, H) to (S, H)
            return combine(back, token_slot, ctx.x_dtype)  # (T, H)

        gradients = experts_backward(d_out, x, gate_up, experts, plan, *ctx.main_grads, finish_rows=sent_back)
        d_weights = gradients.row_weights
        if d_weights is not None:  # in parts, (Ip/128, M)
            d_weights = sums_at_choices(d_weights, choice_row)  # (N, k)
            d_weights = d_weights if d_own_weights is None else d_weights + d_own_weights
            d_weights = at_choices(traffic.back(d_weights), choice_slot)  # (T, k)
        made = gradients_of_inputs(ctx, plan, gradients, d_weights)
        inputs = len(Inputs._fields)
        return *made[:inputs], d_down_bias, *made[inputs + 1 :]


class _Biased(NamedTuple):
    """How the bias of the down projection joins what the experts of a rank return for each token."""

    ids: Tensor
    """int32 `(N, k)`."""
    weights: Tensor
    """fp32 `(N, k)`; unspecified where there is no expert."""
    bias: Tensor
    """`(E, H)`."""

    def added_to(self, sums: Tensor) -> Tensor:
        """`(N, H)`."""
        return add_down_bias(sums, expert_weights_of_tokens(self.ids, self.weights, len(self.bias)), self.bias)

    def gradients(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the weights, fp32 `(N, k)`, and of the bias `(E, H)`, from `(N, H)`."""
        with torch.enable_grad():
            weights, bias = self.weights.detach().requires_grad_(), self.bias.detach().requires_grad_()
            of_experts = expert_weights_of_tokens(self.ids, weights, len(bias)).to(dout.dtype)
            added = of_experts @ bias.to(dout.dtype)
        d_weights, d_bias = torch.autograd.grad(added, (weights, bias), dout)
        return d_weights, d_bias
