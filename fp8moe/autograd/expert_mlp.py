"""The experts between quantized operands: from rows that are quantized already to outputs, and from their quantized
gradients to all others. Who quantizes, gathers or receives them, and who saves what, is the caller's business.

Shapes: `M` rows, `R` padded rows, `E` experts, `H` hidden and `I` intermediate features, `Hp` and `Ip` in whole blocks
of 128. Without a gate, `I` stands for `2I`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fp8moe.autograd.handed_over import Operands
from fp8moe.autograd.weights import ExpertWeight, KeptWeight, expert_product, forward_product
from fp8moe.config import ActivationStorage, ScaleFormat
from fp8moe.gate import GatedActivation
from fp8moe.gemm.select import BACKENDS, Backends
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenLayout, TokenOperand
from fp8moe.quantize.swiglu_backward import quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import quantize_swiglu, quantize_swiglu_forward
from fp8moe.quantize.weights import Split

PassedOn = TypeVar("PassedOn")


class Wanted(NamedTuple):
    """Which inputs get a gradient."""

    x: bool
    w_gate: bool
    w_up: bool
    w_down: bool
    weights: bool
    bias: bool

    @property
    def w_gate_up(self) -> bool:
        """Whether gate or up does."""
        return self.w_gate or self.w_up

    @property
    def d_activation(self) -> bool:
        """Whether anything before the activation does."""
        return self.x or self.w_gate_up or self.weights or self.bias


class GradientDtypes(NamedTuple):
    """Those of the inputs."""

    rows: torch.dtype
    w_gate_up: torch.dtype
    w_down: torch.dtype


class StoredTransposed(NamedTuple):
    """Which weights are stored `(E, K, N)`, and seen transposed."""

    gate_up: bool
    down: bool


class TokenTiles(NamedTuple):
    """How many tokens share a scale, feature by feature, on the activations' side of each wgrad."""

    x: int
    """Of the rows, in that of gate and up."""
    activation: int
    """In that of down."""


@dataclass(frozen=True)
class Plan:
    """How the experts compute: all that is no tensor."""

    num_rows: int
    """`M`."""
    backends: Backends
    scale_format: ScaleFormat
    storage: ActivationStorage
    token_tiles: TokenTiles
    wanted: Wanted
    dtypes: GradientDtypes
    keeps_weights: bool
    """Whether forward keeps the dgrad operands of the weights for backward."""
    transposed: StoredTransposed
    hidden_size: int
    """`H`."""
    act: GatedActivation
    """Without its bias, which is a tensor."""
    split: Split
    """How `w_gate_up` is divided, if it is one tensor."""
    observed: "Observation | None" = None
    """What looks on, if anybody watches."""

    @property
    def padded_width(self) -> int:
        """`2Ip`."""
        return self.act.gate.projections * self.act.padded_features

    @property
    def token_layout(self) -> TokenLayout:
        """In which wgrad takes its operands."""
        return BACKENDS[self.backends.wgrad].token_layout


@dataclass(frozen=True, eq=False)
class Experts:
    """The weights, and where the rows lie."""

    groups: TokenGroups
    gate_up: ExpertWeight
    """`(E, 2I, H)`, divided in halves, or gate and up `(E, I, H)` each. May be empty in backward, if the rows want no
    gradient."""
    down: ExpertWeight
    """`(E, H, I)`. May be empty in backward, if nothing before the activation wants a gradient."""
    row_weights: Tensor | None
    """`(M,)`: scale each row's activation."""
    bias: Tensor | None
    """`(E, 2I)`: added to gate and up."""


@dataclass
class GateUp:
    """What forward leaves of the activation for backward, which takes the values and drops them with their last use."""

    values: Tensor | RowOperand | None
    """`(M, 2Ip)` in bf16; or quantized, `(R, 2Ip)`. Without the bias."""
    act_tiles: LongTiles | None
    """In which backward quantizes the activation's tokens, if they are longer than 128."""

    def take_values(self) -> Tensor | RowOperand:
        """The values, which must be there."""
        values, self.values = self.values, None
        return cast(Tensor | RowOperand, values)


class KeptWeights(NamedTuple):
    """What forward keeps of the weights for backward."""

    gate_up: KeptWeight = KeptWeight()
    down: KeptWeight = KeptWeight()


class Observation(Protocol):
    """Looks at what one call of a layer or a product computes with, in forward and in backward.

    It changes nothing, and nothing in it makes the host wait for the device.
    """

    def operand(
        self, name: str, x: Tensor, groups: TokenGroups | None, scale_format: ScaleFormat, *, rows: bool, tokens: bool
    ) -> None:  # fmt: skip
        """`x`, `(M, D)` or `(T, D)`, becomes a row operand, a token operand, or both. `groups` says which rows of `x`
        are read; None: all, and they are grouped elsewhere."""

    def weight(self, name: str, weight: ExpertWeight, scale_format: ScaleFormat) -> None:
        """`weight` is multiplied with."""

    def gate_up(self, gate_up: Tensor, experts: Experts, plan: Plan) -> None:
        """`(M, 2Ip)` in bf16, of which the activation will be quantized."""

    def d_activation(
        self, d_activation: Tensor, gate_up: Tensor | RowOperand, experts: Experts, plan: Plan
    ) -> None:  # fmt: skip
        """bf16 `(M, Ip)`, of which, and of forward's gate and up, the gradient of these will be quantized."""

    def routed(self, ends: Tensor) -> None:
        """int32 `(E,)`: the end row of each expert."""

    def result(self, name: str, x: Tensor, *, hidden: Tensor | None = None, in_fp8: bool = True) -> None:
        """A result `(M, D)` or `(T, D)`, with or without FP8 behind it; with the output of a layer its input, of the
        same shape. No element of them is unspecified."""


class Gradients(NamedTuple, Generic[PassedOn]):
    """What backward makes; None for what is not wanted."""

    passed_on: PassedOn
    """What became of the gradients of the rows and of their weights."""
    w_gate_up: Tensor | None
    """`(E, 2I, H)`; None also where it was added to a `main_grad`."""
    w_down: Tensor | None
    """`(E, H, I)`; likewise."""
    bias: Tensor | None
    """fp32 `(E, 2I)`."""


def experts_forward(
    take_rows: Callable[[], RowOperand], experts: Experts, plan: Plan, out_dtype: torch.dtype
) -> tuple[Tensor, GateUp | None, KeptWeights]:
    """From the rows `(R, Hp)` of the experts, taken as late as can be, to their outputs.

    Returns:
        out: `(M, H)` in `out_dtype`; zeros for rows of no group.
        gate_up: for `experts_backward`; None if nothing wants a gradient.
        kept: of the weights, for those that `experts_backward` gets.
    """
    forward, groups, scale_format, wanted = plan.backends.forward, experts.groups, plan.scale_format, plan.wanted
    act = plan.act.with_bias(experts.bias)
    gate_up, kept_gate_up = forward_product(
        forward, take_rows, experts.gate_up, groups, plan.padded_width, torch.bfloat16, scale_format,
        keep=plan.keeps_weights and wanted.x,
    )  # (M, 2Ip)  # fmt: skip
    if plan.observed is not None:
        plan.observed.gate_up(gate_up, experts, plan)
    made = quantize_swiglu_forward(
        gate_up, groups, scale_format, token_tile=plan.token_tiles.activation if wanted.w_down else BLOCK,
        x_rows=any(wanted) and plan.storage is ActivationStorage.FP8, row_weights=experts.row_weights, act=act,
    )  # fmt: skip
    left = GateUp(gate_up if made.x_rows is None else made.x_rows, made.long_tiles) if any(wanted) else None
    del gate_up  # unless backward takes it as it is, its memory is free for the product
    act_rows = Operands(made.rows)
    del made
    out, kept_down = forward_product(
        forward, act_rows.take_rows, experts.down, groups, plan.hidden_size, out_dtype, scale_format,
        keep=plan.keeps_weights and wanted.d_activation,
    )  # (M, H)  # fmt: skip
    kept = KeptWeights(kept_gate_up, kept_down)
    return out, left, kept


def experts_backward(
    dout: Operands, x: Operands, gate_up: GateUp, experts: Experts, plan: Plan,
    main_grad_gate_up: Tensor | None, main_grad_down: Tensor | None,
    *, pass_on: Callable[[Tensor | None, Tensor | None], PassedOn],
) -> Gradients[PassedOn]:  # fmt: skip
    """From the gradient of the outputs to all gradients that are wanted.

    In this order, and each operand dropped with its last use, memory peaks at the dgrad of gate and up alone.

    Args:
        dout: of `(M, H)`: its rows if anything before the activation wants a gradient, its tokens if `w_down` does.
        x: of forward's rows `(M, H)`: its tokens if gate or up want a gradient.
        gate_up: of `experts_forward`.
        main_grad_gate_up, main_grad_down: fp32 `(E, 2I, H)` and `(E, H, I)`: the weights' gradients are added to them.
        pass_on: takes the gradients of the rows `(M, H)`, and of their weights, fp32 `(Ip/128, M)` in parts
            (`sums_at_rows`, `sums_at_choices`), before the last wgrad takes memory and time. None for what is not
            wanted.
    """
    wanted, groups, scale_format, layout = plan.wanted, experts.groups, plan.scale_format, plan.token_layout
    dgrad, act = plan.backends.dgrad, plan.act.with_bias(experts.bias)
    values, act_tiles = gate_up.take_values(), gate_up.act_tiles

    d_x = Operands()  # (R, 2Ip) and (2I, R)
    act_tokens = d_row_weights = d_bias = None
    if wanted.d_activation:
        d_activation = expert_product(
            dgrad, dout.take_rows, experts.down, groups, act.padded_features, torch.bfloat16, scale_format,
            for_dgrad=True,
        )  # (M, Ip)  # fmt: skip
        if plan.observed is not None:
            plan.observed.d_activation(d_activation, values, experts, plan)
        made = quantize_swiglu_backward(
            d_activation, values, groups, scale_format,
            d_x_rows=wanted.x, d_x_tokens=wanted.w_gate_up, act_tokens=wanted.w_down, d_row_weights=wanted.weights,
            d_bias=wanted.bias, layout=layout, row_weights=experts.row_weights, long_tiles=act_tiles, act=act,
        )  # fmt: skip
        d_x, act_tokens = Operands(made.d_x_rows, made.d_x_tokens), made.act_tokens
        d_row_weights, d_bias = made.d_row_weights, made.d_bias
        del made, d_activation
    elif wanted.w_down:
        _, act_tokens = quantize_swiglu(
            values, groups, scale_format,
            rows=False, tokens=layout, row_weights=experts.row_weights, long_tiles=act_tiles, act=act,
        )  # fmt: skip
    del values

    d_rows = d_gate_up = d_down = None
    if act_tokens is not None:
        d_down = _wgrad_or_add(
            plan, dout.take_tokens(), act_tokens, groups, plan.dtypes.w_down, main_grad_down, plan.transposed.down
        )
        del act_tokens
    if wanted.x:
        d_rows = expert_product(
            dgrad, d_x.take_rows, experts.gate_up, groups, plan.hidden_size, plan.dtypes.rows, scale_format,
            for_dgrad=True,
        )  # (M, H)  # fmt: skip
    passed_on = pass_on(d_rows, d_row_weights)
    del d_rows, d_row_weights
    if wanted.w_gate_up:
        d_x_tokens, x_tokens = d_x.take_tokens(), x.take_tokens()
        d_gate_up = _wgrad_or_add(
            plan, d_x_tokens, x_tokens, groups, plan.dtypes.w_gate_up, main_grad_gate_up, plan.transposed.gate_up
        )
    return Gradients(passed_on, d_gate_up, d_down, d_bias)


def _wgrad_or_add(
    plan: Plan, lhs: TokenOperand, rhs: TokenOperand, groups: TokenGroups, dtype: torch.dtype,
    main_grad: Tensor | None, transposed: bool,
) -> Tensor | None:  # fmt: skip
    """The gradient of a weight, `(E, D of lhs, D of rhs)`, or None after adding it to `main_grad`.

    `transposed` says that the weight is stored the other way: then so is its gradient, and autograd need not copy it.
    """
    wgrad = BACKENDS[plan.backends.wgrad]
    if main_grad is None:
        if transposed and rhs.token_tile == BLOCK:  # only the right side has longer tiles
            return wgrad.k_grouped(rhs, lhs, groups, dtype).transpose(1, 2)
        return wgrad.k_grouped(lhs, rhs, groups, dtype)
    wgrad.k_grouped_add(lhs, rhs, groups, main_grad)
    return None
