"""Experts that somebody else wrote: which parameter is what, and proof that fp8moe computes the same.

Names of parameters and arguments tell little. So a module's own forward is run on random numbers, in place of its
parameters too, and compared with each meaning that the shapes allow.
"""

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import permutations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8moe.autograd.experts import swiglu_experts
from fp8moe.autograd.mlp_weights import Weight
from fp8moe.autograd.moe import moe_forward
from fp8moe.checks import DEVICE_TYPES, FLOAT_DTYPES
from fp8moe.config import FP8Config
from fp8moe.operands import BLOCK

TOKENS = 32
SAME_DB = 32
"""The least agreement of each row that proves equality: computing in BF16 leaves 40, GELU for SiLU 15."""


class Call(Enum):
    """What a forward takes. Each returns one row for each row of its first argument."""

    IDS_WEIGHTS = "(hidden, topk_ids, topk_weights)"
    WEIGHTS_IDS = "(hidden, topk_weights, topk_ids)"
    ROWS_COUNTS = "(rows, num_tokens_per_expert)"


@dataclass(frozen=True)
class Layout:
    """Which parameter is what. Each may be stored transposed."""

    gate: str
    """`(E, I, H)`; `(E, 2I, H)`, gate and up, where `up` is None."""
    up: str | None
    down: str
    """`(E, H, I)`."""
    gate_is_transposed: bool
    down_is_transposed: bool
    up_is_first: bool = False
    """Of the two in one parameter."""

    def weights(self, named: Any) -> tuple[Weight, Tensor]:
        """As fp8moe's functions take them: views of the attributes of `named`."""
        gate = _oriented(getattr(named, self.gate), self.gate_is_transposed)
        down = _oriented(getattr(named, self.down), self.down_is_transposed)
        if self.up is not None:
            return (gate, _oriented(getattr(named, self.up), self.gate_is_transposed)), down
        if not self.up_is_first:
            return gate, down
        up, gate = gate.chunk(2, dim=1)
        return (gate, up), down


@dataclass(frozen=True)
class HandWritten:
    """What fp8moe computes in place of a module's forward."""

    call: Call
    layout: Layout
    arguments: tuple[str, ...]
    """The names in the module's own signature."""
    config: FP8Config

    def __call__(self, module: nn.Module, x: Tensor, *routing: Tensor) -> Tensor:
        w_gate_up, w_down = self.layout.weights(module)
        if self.call is Call.ROWS_COUNTS:
            offs = routing[0].cumsum(0, dtype=torch.int32)
            return swiglu_experts(x, w_gate_up, w_down, offs, config=self.config)
        ids, weights = routing if self.call is Call.IDS_WEIGHTS else routing[::-1]
        return moe_forward(x, ids, weights, w_gate_up, w_down, config=self.config)

    def swap_into(self, module: nn.Module) -> None:
        """Parameters, their names and all else of the module stay as they are."""
        module._fp8moe = self  # type: ignore[assignment]
        own: Any = type(module)  # mypy doubts that classes can be hashed
        module.__class__ = _swapped(own)

    @staticmethod
    def take_out_of(module: nn.Module) -> None:
        """Give the module its own forward back.

        Raises:
            RuntimeError: its class has been changed since.
        """
        kinds = type(module).__mro__
        if kinds[1] is not FP8Forward:
            raise RuntimeError(f"the class is now {type(module).__name__}: undo what changed it first (FSDP, perhaps)")
        module.__class__ = kinds[2]
        del module._fp8moe


class FP8Forward(nn.Module):
    """Comes before the class of a module whose forward is swapped."""

    _fp8moe: HandWritten

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module's own forward takes."""
        swap = self._fp8moe
        x, *routing = *args, *(kwargs[name] for name in swap.arguments[len(args) :])
        if x.ndim == 2 and all(tensor.ndim == (1 if swap.call is Call.ROWS_COUNTS else 2) for tensor in routing):
            return swap(self, x, *routing)
        _warn_once(type(self).__name__, tuple(x.shape))
        return super().forward(*args, **kwargs)


@cache
def _swapped(own: Any) -> Any:
    return type(f"FP8{own.__name__}", (FP8Forward, own), {"__module__": own.__module__})


_warned: set[str] = set()


@torch.compiler.assume_constant_result
def _warn_once(kind: str, shape: tuple[int, ...]) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"{kind} computes input of shape {shape} itself: fp8moe.convert tried (T, H) only", stacklevel=4)


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that look like those of experts: two or more of three dimensions, the first of one size."""
    found = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
    return found if len(found) > 1 and len({weight.shape[0] for weight in found.values()}) == 1 else {}


def recognize(module: nn.Module, config: FP8Config) -> HandWritten | str:
    """What computes the same as `module`, or why nothing does, in one sentence.

    The module's own forward is run a few times. It needs the memory of its parameters once more for a moment.

    Args:
        module: it has `expert_parameters`.
        config: how the GEMMs compute.
    """
    parameters = expert_parameters(module)
    reason = _why_not_these(module, parameters)
    if reason is not None:
        return reason
    arguments = tuple(inspect.signature(module.forward).parameters.values())
    names = tuple(argument.name for argument in arguments)
    if not all(argument.kind is argument.POSITIONAL_OR_KEYWORD for argument in arguments) or len(names) not in (2, 3):
        return f"its forward{inspect.signature(module.forward)} takes none of {', '.join(call.value for call in Call)}"
    layouts = list(_layouts(parameters))
    if not layouts:
        shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in parameters.items())
        return f"its shapes are not those of a gate, an up- and a down-projection: {shapes}"
    calls = (Call.ROWS_COUNTS,) if len(names) == 2 else (Call.IDS_WEIGHTS, Call.WEIGHTS_IDS)
    device = next(iter(parameters.values())).device
    errors: list[Exception] = []
    trials = list(product(calls, {_sizes(layout, parameters)[0] for layout in layouts}))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        for call, hidden_size in trials:
            trial = _Trial(module, parameters, call, hidden_size)
            try:
                own = trial.own()
            except Exception as caught:  # whatever its author did not expect
                errors.append(caught)
                continue
            for layout in layouts:
                if _sizes(layout, parameters)[0] == hidden_size and trial.equals(own, layout):
                    return HandWritten(call, layout, names, config)
    if len(errors) == len(trials):
        message = " ".join(str(errors[0]).split())[:200]
        return f"its forward fails on a trial: {type(errors[0]).__name__}: {message}"
    return "it does not compute down @ (silu(gate) * up), or not with the usual gradients, for any order of its weights"


def _why_not_these(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str | None:
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in parameters]
    if others:
        return f"it has other parameters or buffers, which fp8moe would leave out: {', '.join(others)}"
    if len(parameters) > 3:
        return f"it has more than three weights: {', '.join(parameters)}"
    kinds = {(type(weight.data).__name__, weight.dtype, weight.device) for weight in parameters.values()}
    if len(kinds) > 1:
        return "its weights are not all of one dtype and on one device"
    ((kind, dtype, device),) = kinds
    if kind != "Tensor":
        return f"its weights are of the class {kind}: convert before they are sharded or quantized"
    if dtype not in FLOAT_DTYPES:
        return f"its weights are {dtype}, not bf16, fp16 or fp32"
    if device.type not in DEVICE_TYPES:
        return f"its weights are on {device}: move the model to a CPU or CUDA device first"
    return None


def _layouts(parameters: dict[str, nn.Parameter]) -> Iterator[Layout]:
    """All that the shapes allow, in an order that has the likely names first: gate, up, down as the module has them."""
    for names in permutations(parameters):
        gate, up, down = names if len(names) == 3 else (names[0], None, names[1])
        for layout in (
            Layout(gate, up, down, *flags)
            for flags in product((False, True), (False, True), (False, True) if up is None else (False,))
        ):
            hidden_size, intermediate_size = _sizes(layout, parameters)
            rows, columns = _oriented(parameters[gate], layout.gate_is_transposed).shape[1:]
            same = up is None or parameters[up].shape == parameters[gate].shape
            if same and (rows, columns) == (intermediate_size * (2 if up is None else 1), hidden_size):
                yield layout


def _sizes(layout: Layout, parameters: dict[str, nn.Parameter]) -> tuple[int, int]:
    """`H` and `I`."""
    hidden_size, intermediate_size = _oriented(parameters[layout.down], layout.down_is_transposed).shape[1:]
    return hidden_size, intermediate_size


def _oriented(weight: Tensor, is_transposed: bool) -> Tensor:
    return weight.transpose(1, 2) if is_transposed else weight


class _Trial:
    """Random weights and inputs, and what comes out."""

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], call: Call, hidden_size: int) -> None:
        self.module, self.call = module, call
        first = next(iter(parameters.values()))
        self.num_experts = first.shape[0]
        options: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
        options["generator"] = torch.Generator(first.device).manual_seed(0)
        self.weights = {
            name: torch.randn(weight.shape, **options) * max(weight.shape[1:]) ** -0.5
            for name, weight in parameters.items()
        }
        # Small rows and large ones: no clamp of a gate hides. (In fp16 larger ones would overflow.)
        largest = 1.0 if first.dtype is torch.float16 else 2.5
        scale = torch.logspace(-1, largest, TOKENS, device=first.device).to(first.dtype)[:, None]
        self.x = (torch.randn(TOKENS, hidden_size, **options) * scale).requires_grad_()
        self.dout = torch.randn(TOKENS, hidden_size, **options) / scale
        scores = torch.rand(TOKENS, self.num_experts, **options)
        weights, self.ids = scores.topk(min(2, self.num_experts))
        self.topk_weights = weights.requires_grad_()

    def own(self) -> list[Tensor | None]:
        """Output and gradients of the module's own forward, on the weights of this trial: in training, where dropout
        would show, and in evaluation."""
        if self.call is Call.ROWS_COUNTS:
            inputs: tuple[Tensor, ...] = (self.x, self._counts())
        elif self.call is Call.IDS_WEIGHTS:
            inputs = (self.x, self.ids, self.topk_weights)
        else:
            inputs = (self.x, self.topk_weights, self.ids)
        modes = {module: module.training for module in self.module.modules()}
        results = []
        try:
            for training in (True, False):
                self.module.train(training)
                results += self._with_gradients(torch.func.functional_call(self.module, self.weights, inputs))
        finally:
            for module, training in modes.items():
                module.training = training
        return results

    def equals(self, own: list[Tensor | None], layout: Layout) -> bool:
        """Whether it is what the module computes if its parameters mean this."""
        expected = self._with_gradients(self._expected(layout))
        return all(
            actual is not None and reference is not None and _least_sqnr(actual, reference) >= SAME_DB
            for actual, reference in zip(own, 2 * expected, strict=True)
        )

    def _with_gradients(self, out: Any) -> list[Tensor | None]:
        if not isinstance(out, Tensor) or out.shape != self.x.shape:
            what = f"of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise TypeError(f"it returns {what}, not {tuple(self.x.shape)}")
        inputs = (self.x,) if self.call is Call.ROWS_COUNTS else (self.x, self.topk_weights)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.dout.to(out.dtype), allow_unused=True)]

    def _counts(self) -> Tensor:
        """Tokens of each expert: as many for all but the first, which takes the rest; with many experts some are
        empty."""
        each = TOKENS // self.num_experts if self.num_experts <= TOKENS else 0
        counts = torch.full((self.num_experts,), each, device=self.x.device)
        counts[0] += TOKENS - each * self.num_experts
        return counts

    def _expected(self, layout: Layout) -> Tensor:
        """The definition, in fp32."""
        weights = {name: weight.float() for name, weight in self.weights.items()}
        w_gate_up, w_down = layout.weights(_Named(weights))
        gate, up = w_gate_up.chunk(2, dim=1) if isinstance(w_gate_up, Tensor) else w_gate_up
        out = torch.zeros(TOKENS, self.x.shape[1], device=self.x.device)
        owner = torch.arange(self.num_experts, device=self.x.device).repeat_interleave(self._counts())
        for expert in range(self.num_experts):
            if self.call is Call.ROWS_COUNTS:
                share = (owner == expert).float()
            else:
                share = (self.topk_weights.float() * (self.ids == expert)).sum(1)
            token = torch.nonzero(share)[:, 0]
            x = self.x[token].float()
            act = F.silu(x @ gate[expert].T) * (x @ up[expert].T)
            out = out.index_add(0, token, act @ w_down[expert].T * share[token][:, None])
        return out


class _Named:
    def __init__(self, named: dict[str, Tensor]) -> None:
        vars(self).update(named)


def _least_sqnr(actual: Tensor, expected: Tensor) -> float:
    """Of the rows, in dB; -inf where one is not finite. Rows of few numbers are taken together."""
    rows = -1 if actual.shape[-1] >= BLOCK else (-2, -1)
    noise = (actual.double() - expected.double()).square().sum(rows)
    ratio = expected.double().square().sum(rows) / noise
    least = float(10 * torch.log10(ratio.min()))
    return least if bool(torch.isfinite(actual).all()) else float("-inf")
