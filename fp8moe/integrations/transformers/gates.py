"""Which gate experts have, found out by computing it.

transformers names gates in many ways: by the type of `act_fn`, by a method `_apply_gate` of the class, by attributes.
A name can mislead, so the module's own method is run on a few numbers, and compared with each formula it could be.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fp8moe.gate import Gate
from fp8moe.integrations.transformers.upstream import default_apply_gate

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2")
LIMITS, ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
NUMBERS = (*LIMITS, *ALPHAS)
"""The attributes in which transformers' experts keep the numbers of their gates."""


@dataclass(frozen=True)
class GateForm:
    """What experts make of the output of their first product.

    `activation(gate) * (up + up_offset)`, where `gate` is at most `limit` and `up` within `-limit..limit`; experts
    without a gate (`has_gate`) make `activation(up)`.
    """

    activation: str
    """One of `ACTIVATIONS`."""
    alpha: float = 1.0
    """`silu` is `gate * sigmoid(alpha * gate)`."""
    limit: float | None = None
    up_offset: float = 0.0
    interleaved: bool = False
    """Whether features are in the order gate, up, gate, up ...; else all of the gate are before all others."""
    has_gate: bool = True

    def __call__(self, projected: Tensor) -> Tensor:
        """`(..., 2I)`, without a gate `(..., I)`, to `(..., I)`, of the same dtype."""
        if not self.has_gate:
            return self._activate(projected)
        gate, up = (projected[..., ::2], projected[..., 1::2]) if self.interleaved else projected.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._activate(gate) * (up + self.up_offset)

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return x * torch.sigmoid(self.alpha * x)
        if self.activation == "relu2":
            return F.relu(x).square()
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def __str__(self) -> str:
        x = "gate" if self.has_gate else "up"
        formula = f"{x} * sigmoid({self.alpha:g} {x})" if self.alpha != 1 else f"{self.activation}({x})"
        if self.has_gate:
            formula += f" * (up + {self.up_offset:g})" if self.up_offset else " * up"
        if self.limit is not None:
            formula += f", clamped at {self.limit:g}"
        return f"{formula}, interleaved" if self.interleaved else formula

    @property
    def computed_as(self) -> Gate | None:
        """The gate of fp8moe that computes it; None if there is none."""
        plain = self.limit is None and self.up_offset == 0
        if self.activation == "silu" and self.has_gate:
            if plain and self.alpha == 1:
                return Gate.swiglu()
            return Gate.clamped_swiglu(math.inf if self.limit is None else self.limit, self.alpha, self.up_offset)
        if self.activation == "gelu_tanh" and self.has_gate and plain:
            return Gate.geglu_tanh()
        return Gate.relu_squared() if self.activation == "relu2" and not self.has_gate else None


def gate_of(experts: Any) -> GateForm | str:
    """The gate of an experts module, or why it is not known, in one sentence.

    Args:
        experts: of a class that `use_experts_implementation` decorates. Its weights are not read.
    """
    # All that the gate may depend on is read here, where torch.compile sees it: code that was compiled for one layer
    # must not run one with other numbers. The module itself is not passed on: each layer would be compiled by itself.
    activation = getattr(experts, "act_fn", None)
    if isinstance(activation, nn.Module):
        activation = type(activation)
    numbers = [getattr(experts, name, None) for name in NUMBERS]
    # As text: torch.compile takes a float that changes for a symbol, and a gate must not be one.
    numbers = [float(number).hex() if isinstance(number, int | float) else None for number in numbers]
    found = _recognize(type(experts), experts.has_gate, activation, *numbers)
    return found if isinstance(found, str) else GateForm(*found)


@torch.compiler.assume_constant_result
def _recognize(kind: type, has_gate: bool, activation: object, *numbers: str | None) -> Any:
    """The fields of the `GateForm`, which torch.compile takes for constants, or the reason."""
    return _compute_and_compare(kind, has_gate, activation, *numbers)


@cache
def _compute_and_compare(kind: Any, has_gate: bool, activation: Any, *numbers: str | None) -> Any:
    """Run the gate of a stand-in, which has the activation and the numbers that were read, and nothing else."""
    name = getattr(activation, "__name__", str(activation))
    formula = f"{name}(gate) * up" if has_gate else f"{name}(up)"
    if has_gate and kind._apply_gate is not default_apply_gate:
        formula = f"that of {kind.__name__}._apply_gate"
    unknown = f"its gate is {formula}, which fp8moe does not know"
    named = zip(NUMBERS, numbers, strict=True)
    given = {attribute: float.fromhex(number) for attribute, number in named if number is not None}
    # Tracers that replace tensors by fakes must not see this.
    with _disable_current_modes(), torch.no_grad():
        try:
            experts = SimpleNamespace(act_fn=_made_again(activation), **given)
            for form in _candidates(has_gate, given):
                probe = _probe(form)
                expected = form(probe)
                actual = kind._apply_gate(experts, probe) if has_gate else experts.act_fn(probe)
                # 1e-6: some compute in fp32. The two kinds of GELU are 5e-4 apart.
                if actual.shape == expected.shape and torch.allclose(actual.double(), expected, rtol=1e-6, atol=1e-6):
                    return astuple(form)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return unknown  # it needs more than the stand-in has
    return unknown


def _made_again(activation: Any) -> Any:
    """A function as it is; a module only if its class is one function, whatever its options."""
    if not isinstance(activation, type):
        return activation
    is_one_function = activation is nn.SiLU or activation.__module__ == "transformers.activations"
    return activation() if is_one_function else None


def _probe(form: GateForm) -> Tensor:
    """All pairs of small and large numbers: no clamp and no cap that matters in training hides."""
    size = torch.logspace(-3, 4, 29, dtype=torch.float64, device="cpu")
    gate, up = torch.cartesian_prod(*[torch.cat([-size, size])] * 2).unbind(1)
    if not form.has_gate:
        return up
    return torch.stack([gate, up], 1).flatten() if form.interleaved else torch.cat([gate, up])


def _candidates(has_gate: bool, given: Mapping[str, float]) -> Iterator[GateForm]:
    """Likely ones first."""
    if not has_gate:
        yield from (GateForm(activation, has_gate=False) for activation in ACTIVATIONS)
        return
    limits = [None, *(given[name] for name in LIMITS if name in given)]
    alphas = [1.0, *(given[name] for name in ALPHAS if name in given)]
    for interleaved, limit, activation in product((False, True), limits, ACTIVATIONS):
        for alpha, up_offset in product(alphas if activation == "silu" else [1.0], (0.0, 1.0)):
            yield GateForm(activation, alpha, limit, up_offset, interleaved)
