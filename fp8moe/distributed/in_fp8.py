"""Experts on several ranks whose rows travel in FP8: one autograd function, because between two of them a gradient
could only be passed on in the dtype of its tensor.

What travels hides behind what the experts compute without it. In forward `w_gate_up` is quantized while the host waits
for the number of messages, and `w_down` while they are on their way; in backward `w_down` while the gradients come. The
last wgrad runs while the gradients go home. What the experts return in forward hides behind nothing.

Shapes: as in `plan.py`; `M` rows of this rank's experts, `H` and `I` features.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.expert_mlp import Experts, Plan, experts_backward, experts_forward
from fp8moe.autograd.experts import (
    Inputs,
    Saved,
    backends_of_layer,
    expert_weight,
    gradients_of_inputs,
    inputs_of,
    plan_of,
    wanted_of,
    without_main_grads_that_nobody_asks_for,
)
from fp8moe.autograd.handed_over import Operands
from fp8moe.autograd.mlp_weights import MlpWeights, add_down_bias, expert_weights_of_tokens
from fp8moe.autograd.observed import observation_of
from fp8moe.autograd.once import differentiable_once
from fp8moe.autograd.weights import MadeAhead
from fp8moe.config import FP8Config, ScaleFormat
from fp8moe.distributed.plan import ArrivingMessages, Departure, DispatchPlan, Traffic
from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand
from fp8moe.quantize.messages import (
    Messages,
    dequantize,
    pack_sums,
    requantize_messages,
    spread_messages,
)
from fp8moe.quantize.weight_source import handle_after_use
from fp8moe.quantize.weights import Split
from fp8moe.rows.combine import combine
from fp8moe.rows.part_sums import sums_at_choices
from fp8moe.rows.routing import Routing

OPERATION = "fp8moe.distributed.ep_moe_forward"


def ep_in_fp8(
    hidden: Tensor, weights: Tensor, mlp: MlpWeights, down_bias: Tensor | None, depart: Departure, config: FP8Config
) -> Tensor:
    """`(T, H)` to `(T, H)`, with the router's `weights` `(T, k)`; `depart` lets their messages leave."""
    inputs = inputs_of(hidden, mlp, weights)
    wanted, keeps = wanted_of(inputs), config.keep_quantized_weights
    handle_gate_up, handle_down = mlp.handles
    with torch.no_grad():
        gate_up = expert_weight(
            inputs.w_gate, inputs.w_up, handle_gate_up, mlp.split if inputs.w_up is None else Split.WHOLE
        ).made_ahead(config.scale_format, keep=keeps and wanted.x)
        dispatch = depart()
        down = expert_weight(inputs.w_down, None, handle_down).made_ahead(
            config.scale_format, keep=keeps and wanted.d_activation
        )
    backends = backends_of_layer(hidden, mlp, dispatch.num_rows, config)
    if backends is None:
        raise RuntimeError("config.allow_bf16 must be False here")
    plan = plan_of(inputs, mlp, dispatch.num_rows, torch.bfloat16, backends, config, observation_of(hidden))
    return _DispatchedExperts.apply(
        *inputs, down_bias, plan, dispatch, output_dtype(hidden), (gate_up, down), *mlp.main_grads, handle_gate_up,
        handle_down,
    )  # fmt: skip


class _DispatchedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, weights: Tensor, bias: Tensor | None,
        down_bias: Tensor | None, plan: Plan, dispatch: DispatchPlan, out_dtype: torch.dtype,
        ahead: tuple[MadeAhead | None, MadeAhead | None], main_grad_gate_up: Tensor | None,
        main_grad_down: Tensor | None, handle_gate_up: Tensor | None, handle_down: Tensor | None,
    ) -> Tensor:  # fmt: skip
        traffic, wanted = dispatch.traffic, plan.wanted
        if plan.observed is not None:
            plan.observed.operand("hidden", x, None, ScaleFormat.POW2, rows=True, tokens=False)  # as it has travelled
        arrived, ids = dispatch.arrive()  # N
        routing = Routing.from_topk(ids, w_down.shape[0], arrived.weights).first_rows(plan.num_rows)
        groups = routing.groups
        experts = Experts(
            groups, expert_weight(w_gate, w_up, handle_gate_up, plan.split)._replace(made=ahead[0]),
            expert_weight(w_down, None, handle_down)._replace(made=ahead[1]), routing.row_weights, bias,
        )  # fmt: skip
        take_rows = partial(_rows, dispatch.arriving, groups.gathering(routing.row_token), routing.choice_row)
        out, gate_up, kept = experts_forward(take_rows, experts, plan, torch.bfloat16)  # (M, H)

        # The messages are saved in the place of the tokens: the operand of wgrad is made from them.
        inputs = Inputs(arrived.data, w_gate, w_up, w_down, weights, bias)
        handles = (handle if handle is None else handle_after_use(handle) for handle in (handle_gate_up, handle_down))
        saved = Saved.of(inputs, kept, experts.row_weights, Operands(), gate_up, wanted)
        maps = (*groups.tensors, routing.row_token, routing.choice_row, dispatch.token_slot, dispatch.choice_place)
        biased = None if down_bias is None else _Biased(ids.clone(), arrived.weights.clone(), down_bias)
        ctx.save_for_backward(*saved, *maps, *handles, *(biased or ()))
        ctx.plan, ctx.traffic, ctx.layout = plan, traffic, arrived.layout
        ctx.has_pair, ctx.x_dtype = w_up is not None, x.dtype
        ctx.weights_dtype, ctx.bias_dtype = weights.dtype, None if bias is None else bias.dtype
        ctx.has_down_bias = down_bias is not None
        ctx.main_grads = main_grad_gate_up, main_grad_down
        del gate_up, saved
        sums = combine(out, routing.choice_row, torch.bfloat16)  # (N, H)
        back = traffic.rows_back(sums if biased is None else biased.added_to(sums)).wait()  # (S, H)
        out = combine(back, dispatch.token_slot, out_dtype)  # (T, H)
        if plan.observed is not None:
            plan.observed.result("output", out, hidden=x)
        return out

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan, traffic = without_main_grads_that_nobody_asks_for(ctx), cast(Traffic, ctx.traffic)
        wanted, tensors, count = plan.wanted, ctx.saved_tensors, len(Saved._fields)
        saved = Saved(*tensors[:count])
        biased = _Biased(*tensors[-3:]) if ctx.has_down_bias else None
        *maps, row_token, choice_row, token_slot, choice_place, handle_gate_up, handle_down = tensors[
            count : -3 if biased else None
        ]
        groups = TokenGroups(plan.num_rows, *maps)
        gathering = groups.gathering(row_token)

        if plan.observed is not None:
            plan.observed.operand("d_output", dout, None, ScaleFormat.POW2, rows=True, tokens=False)
        arriving = traffic.send_gradient(dout, token_slot, in_fp8=True, clear=ctx.has_down_bias)
        d_out = Operands(
            partial(_rows, arriving, gathering, choice_row) if wanted.d_activation else None,
            partial(_tokens, arriving, gathering, plan.token_layout) if wanted.w_down else None,
        )
        x = Operands()
        if saved.x is not None:
            messages = Messages(saved.x, ctx.layout)
            x.tokens = partial(requantize_messages, messages, gathering, plan.token_layout, plan.token_tiles.x)
            del messages
        kept = saved.kept()
        experts = Experts(
            groups, expert_weight(saved.w_gate, saved.w_up, handle_gate_up, plan.split, kept.gate_up),
            expert_weight(saved.w_down, None, handle_down, kept=kept.down), saved.row_weights, saved.bias,
        )  # fmt: skip
        gate_up = saved.gate_and_up(plan)
        d_down_bias = d_own_weights = None
        if biased:
            d_own_weights, d_down_bias = biased.gradients(dequantize(arriving.wait()).bfloat16())
        del arriving, tensors, saved, kept

        def sent_home(d_rows: Tensor | None, d_weights: Tensor | None) -> ArrivingMessages | None:
            if d_rows is None and d_weights is None:
                return None
            messages = pack_sums(d_rows, d_weights, choice_row)  # (M, H) and (parts, M) to N
            if d_weights is not None and d_own_weights is not None:
                messages.weights.add_(d_own_weights)
            return traffic.back(messages)

        gradients = experts_backward(d_out, x, gate_up, experts, plan, *ctx.main_grads, pass_on=sent_home)
        d_x = d_weights = None
        if gradients.passed_on is not None:
            home = gradients.passed_on.wait()  # S
            d_x = combine(home.values, token_slot, ctx.x_dtype) if wanted.x else None  # (T, H)
            numbers = home.weights.reshape(1, -1)  # of S * k choices, in one part
            d_weights = sums_at_choices(numbers, choice_place) if wanted.weights else None  # (T, k)
        if plan.observed is not None and d_x is not None:
            plan.observed.result("d_hidden", d_x)
        made = gradients_of_inputs(ctx, plan, gradients, d_x, d_weights)
        inputs = len(Inputs._fields)
        return *made[:inputs], d_down_bias, *made[inputs + 1 :]


def _rows(arriving: ArrivingMessages, groups: TokenGroups, choice_row: Tensor) -> RowOperand:
    """The row operand of what arrives, when it is there."""
    return spread_messages(arriving.wait(), groups, choice_row)


def _tokens(arriving: ArrivingMessages, groups: TokenGroups, layout: TokenLayout) -> TokenOperand:
    """The token operand, likewise."""
    return requantize_messages(arriving.wait(), groups, layout)


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
