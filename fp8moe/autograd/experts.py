"""`swiglu_experts`: the whole expert MLP as one differentiable operation, six GEMMs in FP8 and little in between.

Shapes: `T` tokens, `k` choices a token, `M` rows (`T * k` behind a router), `R` padded rows, `E` experts, `H` hidden
and `I` intermediate features.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.expert_mlp import (
    Experts,
    GateUp,
    GradientDtypes,
    Gradients,
    KeptWeights,
    Observation,
    Plan,
    StoredTransposed,
    TokenTiles,
    Wanted,
    experts_backward,
    experts_forward,
)
from fp8moe.autograd.experts_in_bf16 import experts_in_bf16
from fp8moe.autograd.grouped_mm import DEFAULT_CONFIG
from fp8moe.autograd.handed_over import Operands
from fp8moe.autograd.main_grad import is_wanted, nothing_for, with_main_grad
from fp8moe.autograd.mlp_weights import (
    NO_BIASES,
    NO_CACHES,
    NO_MAIN_GRADS,
    Biases,
    MainGrads,
    MlpWeights,
    Weight,
    WeightCaches,
    add_down_bias,
    expert_weights_of_rows,
    expert_weights_of_tokens,
    is_stored_transposed,
)
from fp8moe.autograd.observed import observation_of
from fp8moe.autograd.once import differentiable_once
from fp8moe.autograd.validate import check_activation, check_experts, check_offs_values
from fp8moe.autograd.weights import ExpertWeight, KeptWeight
from fp8moe.config import FP8Config, KernelPreference, check_config
from fp8moe.gate import SWIGLU, Gate, GatedActivation
from fp8moe.gemm.select import Backends, backends_for, token_tile_for
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenOperand
from fp8moe.quantize import quantize_operands, quantize_tokens
from fp8moe.quantize.gathered import as_saved
from fp8moe.quantize.spread_rows import quantize_and_spread_rows
from fp8moe.quantize.weight_source import handle_after_use
from fp8moe.quantize.weights import Split
from fp8moe.rows.combine import combine
from fp8moe.rows.groups import ends_of, plan_groups
from fp8moe.rows.part_sums import sums_at_choices, sums_at_rows
from fp8moe.rows.routing import Routing, route_choices

NOTHING_KEPT = KeptWeight()


def swiglu_experts(
    a: Tensor,
    w_gate_up: Weight,
    w_down: Tensor,
    offs: Tensor,
    row_weights: Tensor | None = None,
    *,
    config: FP8Config = DEFAULT_CONFIG,
    gate: Gate | None = None,
    biases: Biases = NO_BIASES,
    interleaved: bool = False,
    main_grads: MainGrads = NO_MAIN_GRADS,
    weight_caches: WeightCaches = NO_CACHES,
) -> Tensor:
    """Each group's rows through its own SwiGLU MLP: `w_down @ (silu(w_gate @ x) * (w_up @ x) * weight)`.

    Between the GEMMs nothing is stored in high precision but `(M, 2I)`, from which SwiGLU, its gradient and every
    operand are computed; for backward it saves that (in BF16, or FP8: `FP8Config.activation_storage`) and `a` in FP8.
    Other gates take the place of SwiGLU, and biases join, at no further pass over the activations.

    Args:
        a: `(M, H)` bf16, fp16 or fp32, any strides, the rows of each group together; `H` and `I` are any sizes.
        w_gate_up: `(E, 2I, H)`, the gate's rows first, or the pair `(w_gate, w_up)`, `(E, I, H)` each, which is never
            joined in high precision. With a gate that has none, `w_up` alone, `(E, I, H)`. A weight stored
            `(E, H, 2I)` is passed as `w.transpose(1, 2)`, and its gradient comes in its layout.
        w_down: `(E, H, I)`; stored `(E, I, H)`, likewise.
        offs: int32 `(E,)`, as in `grouped_mm`; rows from `offs[-1]` on come out as zeros, with zero gradients.
        row_weights: any float dtype `(M,)`: scales what each row's expert returns. Its gradient costs no extra pass.
        config: backend, scale format, storage and checks.
        gate: what makes an activation of `w_gate @ x` and `w_up @ x`; defaults to SwiGLU.
        biases: of any float dtype: `(E, 2I)`, in the order of the rows of `w_gate_up` (`(E, I)` without a gate), and
            `(E, H)`. Either may be None.
        interleaved: whether the rows of `w_gate_up`, one tensor, are those of gate and up by turns. It is quantized
            as it is, and its gradient comes in its order.
        main_grads: fp32 `(E, 2I, H)` and `(E, H, I)`, contiguous: the weight gradients are added to them in place, and
            the weights get none (see `grouped_mm`). Either may be None. Not with separate `w_gate` and `w_up` for the
            first.
        weight_caches: of `w_gate_up` and `w_down`; either may be None. Not with separate `w_gate` and `w_up` for the
            first.

    Returns:
        `(M, H)`, in the dtype of `a`, under autocast in the autocast dtype. It can be differentiated once.

    Raises:
        TypeError: an argument is not of the right type or dtype.
        ValueError: an argument has the wrong rank, shape or device.
        BackendUnavailableError: `config.kernel_preference` names a backend that cannot be used here.
    """
    gate = SWIGLU if gate is None else gate
    check_config(config)
    check_activation(gate, biases, interleaved, w_gate_up, w_down)
    check_experts(a, w_gate_up, w_down, offs, row_weights, main_grads, weight_caches, gate.projections)
    if config.debug:
        check_offs_values(offs, a.shape[0], config.assume_full)
    row_weights = None if row_weights is None else at_most_fp32(row_weights)
    act = GatedActivation(w_down.shape[2], gate, biases[0], interleaved)
    mlp = MlpWeights(w_gate_up, w_down, act, main_grads, weight_caches)
    backends, observed = backends_of_layer(a, mlp, a.shape[0], config), observation_of(a)
    if backends:
        groups = plan_groups(offs, a.shape[0])
        out, ends = _in_fp8(a, mlp, row_weights, groups, None, backends, config, observed), groups.ends
        if observed is not None:
            observed.result("output", out)
    else:
        ends = ends_of(offs, a.shape[0], config.assume_full)
        out = experts_in_bf16(a, mlp, ends, row_weights, None, zero_unused=not config.assume_full)
        if observed is not None:
            _observe_in_bf16(observed, ends, out, None)
    if biases[1] is not None:
        out = add_down_bias(out, expert_weights_of_rows(ends, a.shape[0], row_weights), biases[1])
    return out


def routed_experts(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, mlp: MlpWeights, down_bias: Tensor | None,
    config: FP8Config, num_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """`(T, H)` to `(T, H)`: the rows are gathered from the tokens as they are quantized, and summed where they end.

    `num_rows` is how many choices are of an expert, or more, if the caller knows that not all are.
    """
    topk_weights, observed = at_most_fp32(topk_weights), observation_of(hidden)
    num_experts = mlp.w_down.shape[0]
    backends = backends_of_layer(hidden, mlp, topk_weights.numel() if num_rows is None else num_rows, config)
    looked_at = hidden if num_rows is None else None  # else tokens of no choice may hold anything
    if backends:
        routing = Routing.from_topk(topk_ids, num_experts, topk_weights)
        if num_rows is not None:
            routing = routing.first_rows(num_rows)
        out = _in_fp8(hidden, mlp, topk_weights, routing.groups, routing, backends, config, observed)
        if observed is not None:
            observed.result("output", out, hidden=looked_at)
    else:
        ends, choice_row = route_choices(topk_ids, num_experts)
        out = experts_in_bf16(hidden, mlp, ends, topk_weights, choice_row, zero_unused=False)
        if observed is not None:
            _observe_in_bf16(observed, ends, out, looked_at)
    if down_bias is not None:
        out = add_down_bias(out, expert_weights_of_tokens(topk_ids, topk_weights, num_experts), down_bias)
    return out


def _observe_in_bf16(observed: Observation, ends: Tensor, out: Tensor, hidden: Tensor | None) -> None:
    """Nothing is quantized: only where rows go, and what comes out, and back, is to be seen."""
    observed.routed(ends)
    observed.result("output", out, hidden=hidden, in_fp8=False)
    if out.requires_grad:
        out.register_hook(lambda d_out: observed.result("d_output", d_out, in_fp8=False))


def at_most_fp32(weights: Tensor) -> Tensor:
    """float64 weights in fp32, others as they are."""
    return weights.float() if weights.dtype is torch.float64 else weights


def backends_of_layer(x: Tensor, mlp: MlpWeights, num_rows: int, config: FP8Config) -> Backends | None:
    """Both weights go one way: their token operands have one layout. Cached are both or neither. Of a weight that is
    gathered in FP8 there is nothing to compute with in BF16."""
    config = replace(config, allow_bf16=False) if mlp.is_gathered else config
    num_experts, hidden_size, intermediate_size = mlp.w_down.shape
    cached = mlp.weight_caches[0] is not None and mlp.weight_caches[1] is not None
    shape = (num_rows, hidden_size, intermediate_size, num_experts)
    return backends_for(config, x.device, shape, layer=True, cached=cached)


class Inputs(NamedTuple):
    """What gradients may reach."""

    x: Tensor
    """Rows `(M, H)`, or tokens `(T, H)`."""
    w_gate: Tensor
    """`(E, I, H)`; `(E, 2I, H)`, gate and up, where `w_up` is None."""
    w_up: Tensor | None
    """`(E, I, H)`."""
    w_down: Tensor
    """`(E, H, I)`."""
    weights: Tensor | None
    """Of rows `(M,)`, or of choices `(T, k)`."""
    bias: Tensor | None
    """Of gate and up, `(E, 2I)`."""


class Saved(NamedTuple):
    """What backward needs of forward, but for what both share; None where it does not. Operands as they are stored: a
    hook that moves a saved tensor away loses its strides."""

    w_gate: Tensor | None
    w_up: Tensor | None
    w_down: Tensor | None
    kept_gate_up: Tensor | None
    """The data of a `KeptWeight`."""
    kept_gate_up_scale: Tensor | None
    kept_down: Tensor | None
    kept_down_scale: Tensor | None
    row_weights: Tensor | None
    """`(M,)`."""
    x: Tensor | None
    """`(T, H)`, in the place of `x_tokens`."""
    x_tokens: Tensor | None
    """e4m3, the data of a `TokenOperand`."""
    x_tokens_scale: Tensor | None
    gate_up: Tensor | None
    """bf16 `(M, 2Ip)`; or e4m3 `(R, 2Ip)`, the data of a `RowOperand`."""
    gate_up_scale: Tensor | None
    act_amax: Tensor | None
    """fp32 `(R/128, I)`, of `LongTiles`."""
    bias: Tensor | None

    @classmethod
    def of(
        cls, inputs: Inputs, kept: KeptWeights, row_weights: Tensor | None, x: Operands,
        gate_up: GateUp | None, wanted: Wanted,
    ) -> "Saved":  # fmt: skip
        """Of what forward had and made, what the gradients that are wanted need."""
        has_tokens = isinstance(x.tokens, TokenOperand)
        x_tokens, x_tokens_scale = x.take_tokens().tensors if has_tokens else (None, None)
        values, act_tiles = (None, None) if gate_up is None else (gate_up.values, gate_up.act_tiles)
        codes, scale = values.tensors if isinstance(values, RowOperand) else (values, None)
        return cls(
            as_saved(inputs.w_gate) if wanted.x and kept.gate_up.data is None else None,
            as_saved(inputs.w_up) if inputs.w_up is not None and wanted.x and kept.gate_up.data is None else None,
            as_saved(inputs.w_down) if wanted.d_activation and kept.down.data is None else None,
            *kept.gate_up,
            *kept.down,
            row_weights,
            inputs.x if wanted.w_gate_up and not has_tokens else None,
            x_tokens, x_tokens_scale,
            codes, scale, None if act_tiles is None else act_tiles.amax,
            inputs.bias,
        )  # fmt: skip

    def kept(self) -> KeptWeights:
        """What forward kept of the weights."""
        return KeptWeights(
            KeptWeight(self.kept_gate_up, self.kept_gate_up_scale), KeptWeight(self.kept_down, self.kept_down_scale)
        )

    def x_operands(
        self, plan: Plan, groups: TokenGroups, row_token: Tensor | None, choice_row: Tensor | None
    ) -> Operands:
        """The input as wgrad takes it, `(H, R)`, if it needs it."""
        if self.x is not None:
            return _quantized(self.x, groups, row_token, choice_row, plan, tokens=True, token_tile=plan.token_tiles.x)
        if self.x_tokens is None or self.x_tokens_scale is None:
            return Operands()
        return Operands(tokens=TokenOperand(self.x_tokens, self.x_tokens_scale, plan.token_layout, plan.token_tiles.x))

    def gate_and_up(self, plan: Plan) -> GateUp:
        """As forward left it."""
        values = cast(Tensor, self.gate_up)
        return GateUp(
            values if self.gate_up_scale is None else RowOperand(values, self.gate_up_scale),
            None if self.act_amax is None else LongTiles(plan.token_tiles.activation, self.act_amax),
        )


def makes_operands_apart(x: Tensor, choices: int) -> bool:
    """Whether both operands of the input, tokens `(T, H)` each of which `k` rows copy, are made apart, each where it is
    used: the row operand in forward, with each token quantized once for all its rows, the token operand in backward.

    Made together, from one read of each row, the token operand is saved: `T * k * H` bytes. Made apart, the input
    itself is, as others often do anyway. That takes no more where a token has as many rows as an element has bytes;
    the time is the same within 1% of a layer (on an H200).
    """
    return statically_known_true(x.element_size() <= choices)  # adds no guard to a trace


def _quantized(
    x: Tensor, groups: TokenGroups, row_token: Tensor | None, choice_row: Tensor | None, plan: Plan,
    *, rows: bool = False, tokens: bool = False, token_tile: int = BLOCK, apart: bool = False,
) -> Operands:  # fmt: skip
    """The operands that are asked for, of rows `(M, H)`, or of tokens `(T, H)` and a routing; with `apart`, the tokens
    when they are taken."""
    gathering = groups.gathering(row_token)
    if choice_row is None or (rows and tokens and not apart):
        layout = plan.token_layout if tokens else None
        return Operands(
            *quantize_operands(x, gathering, plan.scale_format, rows=rows, tokens=layout, token_tile=token_tile)
        )
    return Operands(
        quantize_and_spread_rows(x, gathering, choice_row, plan.scale_format) if rows else None,
        partial(quantize_tokens, x, gathering, plan.scale_format, plan.token_layout, token_tile) if tokens else None,
    )


def inputs_of(x: Tensor, mlp: MlpWeights, weights: Tensor | None) -> Inputs:
    """What an autograd function takes of them, with nodes of autograd before the weights that have a `main_grad`."""
    w_gate, w_up = (mlp.w_gate_up, None) if isinstance(mlp.w_gate_up, Tensor) else mlp.w_gate_up
    main_grads = mlp.main_grads
    return Inputs(
        x, with_main_grad(w_gate, main_grads[0]), w_up, with_main_grad(mlp.w_down, main_grads[1]), weights, mlp.act.bias
    )


def wanted_of(inputs: Inputs) -> Wanted:
    """Which of them get a gradient. Within `Function.forward` grad mode is always off, and whether there will be a
    backward is not known: so this is asked before."""
    has_backward = torch.is_grad_enabled()
    return Wanted(*(has_backward and tensor is not None and tensor.requires_grad for tensor in inputs))


def plan_of(
    inputs: Inputs, mlp: MlpWeights, num_rows: int, rows_dtype: torch.dtype, backends: Backends, config: FP8Config,
    observed: Observation | None,
) -> Plan:  # fmt: skip
    """How to compute them, and what for. `rows_dtype` is that of the gradient of the rows."""
    w_gate, w_up, w_down = inputs.w_gate, inputs.w_up, inputs.w_down
    transposed = StoredTransposed(w_up is None and is_stored_transposed(w_gate), is_stored_transposed(w_down))
    return Plan(
        num_rows, backends, config.scale_format, config.activation_storage,
        _token_tiles(config, backends.wgrad, transposed, mlp.main_grads),
        wanted_of(inputs),
        GradientDtypes(rows_dtype, w_gate.dtype, w_down.dtype),
        config.keep_quantized_weights,
        transposed,
        w_down.shape[1], mlp.act.with_bias(None), mlp.split if w_up is None else Split.WHOLE,
        observed,
    )  # fmt: skip


def _token_tiles(
    config: FP8Config, wgrad: KernelPreference, transposed: StoredTransposed, main_grads: MainGrads
) -> TokenTiles:
    """A `main_grad` is `(E, N, K)`, and so is the product that is added to it, however its weight is stored."""
    main_grad_gate_up, main_grad_down = main_grads
    return TokenTiles(
        token_tile_for(config, wgrad, on_the_right=main_grad_gate_up is not None or not transposed.gate_up),
        token_tile_for(config, wgrad, on_the_right=main_grad_down is not None or not transposed.down),
    )


def _in_fp8(
    x: Tensor, mlp: MlpWeights, weights: Tensor | None, groups: TokenGroups, routing: Routing | None,
    backends: Backends, config: FP8Config, observed: Observation | None,
) -> Tensor:  # fmt: skip
    inputs = inputs_of(x, mlp, weights)
    rows_dtype = x.dtype if routing is None else torch.bfloat16
    plan = plan_of(inputs, mlp, groups.num_rows, rows_dtype, backends, config, observed)
    route = (None,) * 3 if routing is None else (routing.row_token, routing.choice_row, routing.row_weights)
    # Tensors one by one: torch.compile takes no lists of them here.
    return _FP8Experts.apply(*inputs, plan, output_dtype(x), *mlp.main_grads, *groups.tensors, *route, *mlp.handles)


class _FP8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, weights: Tensor | None,
        bias: Tensor | None, plan: Plan, out_dtype: torch.dtype, main_grad_gate_up: Tensor | None,
        main_grad_down: Tensor | None,
        *shared: Any,  # what `_in_fp8` gives: the maps of the groups and of the routing, and the handles of the weights
    ) -> Tensor:  # fmt: skip
        *maps, row_token, choice_row, row_weights, handle_gate_up, handle_down = shared
        groups = TokenGroups(plan.num_rows, *maps)
        if plan.observed is not None:
            plan.observed.operand(
                "hidden", x, groups.gathering(row_token), plan.scale_format, rows=True, tokens=plan.wanted.w_gate_up
            )
        operands = _quantized(
            x, groups, row_token, choice_row, plan,
            rows=True, tokens=plan.wanted.w_gate_up, token_tile=plan.token_tiles.x,
            apart=choice_row is not None and makes_operands_apart(x, choice_row.shape[1]),
        )  # fmt: skip
        experts = Experts(
            groups, expert_weight(w_gate, w_up, handle_gate_up, plan.split), expert_weight(w_down, None, handle_down),
            weights if choice_row is None else row_weights, bias,
        )  # fmt: skip
        out, gate_up, kept = experts_forward(
            operands.take_rows, experts, plan, out_dtype if choice_row is None else torch.bfloat16
        )  # (M, H)

        inputs = Inputs(x, w_gate, w_up, w_down, weights, bias)
        handles = (handle if handle is None else handle_after_use(handle) for handle in (handle_gate_up, handle_down))
        saved = Saved.of(inputs, kept, experts.row_weights, operands, gate_up, plan.wanted)
        ctx.save_for_backward(*saved, *maps, row_token, choice_row, *handles)
        ctx.plan, ctx.has_pair, ctx.x_dtype = plan, w_up is not None, x.dtype
        ctx.weights_dtype, ctx.bias_dtype = (None if x is None else x.dtype for x in (weights, bias))
        # Not saved: one backward changes them while others wait.
        ctx.main_grads = main_grad_gate_up, main_grad_down
        return out if choice_row is None else combine(out, choice_row, out_dtype)  # (M, H) to (T, H)

    @staticmethod
    @differentiable_once("fp8moe.swiglu_experts")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan = without_main_grads_that_nobody_asks_for(ctx)
        wanted, tensors, count = plan.wanted, ctx.saved_tensors, len(Saved._fields)
        saved = Saved(*tensors[:count])
        *maps, row_token, choice_row, handle_gate_up, handle_down = tensors[count:]
        groups = TokenGroups(plan.num_rows, *maps)
        if plan.observed is not None:
            plan.observed.operand(
                "d_output", dout, groups.gathering(row_token), plan.scale_format,
                rows=wanted.d_activation, tokens=wanted.w_down,
            )  # fmt: skip
        d_out = _quantized(dout, groups, row_token, choice_row, plan, rows=wanted.d_activation, tokens=wanted.w_down)
        kept = saved.kept()
        experts = Experts(
            groups, expert_weight(saved.w_gate, saved.w_up, handle_gate_up, plan.split, kept.gate_up),
            expert_weight(saved.w_down, None, handle_down, kept=kept.down), saved.row_weights, saved.bias,
        )  # fmt: skip
        x, gate_up = saved.x_operands(plan, groups, row_token, choice_row), saved.gate_and_up(plan)
        del tensors, saved, kept  # what checkpointing made again, or a hook brought back, goes with its last use

        def summed(d_rows: Tensor | None, d_weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if d_rows is not None and choice_row is not None:
                d_rows = combine(d_rows, choice_row, ctx.x_dtype)  # (M, H) to (T, H)
            if d_weights is not None:  # in parts, (Ip/128, M), to (M,) or (T, k)
                is_of_rows = choice_row is None
                d_weights = (
                    sums_at_rows(d_weights, groups.ends) if is_of_rows else sums_at_choices(d_weights, choice_row)
                )
            return d_rows, d_weights

        gradients = experts_backward(d_out, x, gate_up, experts, plan, *ctx.main_grads, pass_on=summed)
        d_x, d_weights = gradients.passed_on
        if plan.observed is not None and d_x is not None:
            plan.observed.result("d_hidden", d_x)
        return gradients_of_inputs(ctx, plan, gradients, d_x, d_weights)


def gradients_of_inputs(
    ctx: Any, plan: Plan, gradients: Gradients[Any], d_x: Tensor | None, d_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a `Function.backward` returns whose inputs begin with `Inputs`, and whose `ctx` has what `_FP8Experts` keeps
    there: nothing for weights whose gradient went to a `main_grad`, the rest in the dtypes of the inputs.

    `d_x` is finished; `d_weights` is fp32, in the shape of `Inputs.weights`.
    """
    d_gate, d_up, d_down = gradients.w_gate_up, None, gradients.w_down
    if d_gate is not None and ctx.has_pair:
        d_gate, d_up = d_gate.chunk(2, dim=1)
    main_grad_gate_up, main_grad_down = ctx.main_grads
    if main_grad_gate_up is not None:
        d_gate = nothing_for(ctx, 1, main_grad_gate_up, plan.dtypes.w_gate_up)
    if main_grad_down is not None:
        d_down = nothing_for(ctx, 3 if ctx.has_pair else 2, main_grad_down, plan.dtypes.w_down)
    d_weights = None if d_weights is None else d_weights.to(ctx.weights_dtype)
    d_bias = None if gradients.bias is None else gradients.bias.to(ctx.bias_dtype)
    made = d_x, d_gate, d_up, d_down, d_weights, d_bias
    return *made, *[None] * (len(ctx.needs_input_grad) - len(made))


def expert_weight(
    first: Tensor | None, second: Tensor | None, handle: Tensor | None, split: Split = Split.WHOLE,
    kept: KeptWeight = NOTHING_KEPT,
) -> ExpertWeight:  # fmt: skip
    """Of one tensor, or of a pair that lies side by side."""
    return ExpertWeight(tuple(part for part in (first, second) if part is not None), handle, split, kept)


def without_main_grads_that_nobody_asks_for(ctx: Any) -> Plan:
    """The plan of a backward that may not go on to every weight."""
    plan: Plan = ctx.plan
    wanted, (main_grad_gate_up, main_grad_down) = plan.wanted, ctx.main_grads
    if main_grad_gate_up is not None and not is_wanted(ctx, 1):
        wanted = wanted._replace(w_gate=False)
    if main_grad_down is not None and not is_wanted(ctx, 3 if ctx.has_pair else 2):
        wanted = wanted._replace(w_down=False)
    return plan if wanted is plan.wanted else replace(plan, wanted=wanted)
