"""Which gate an expert has: values that users pass, and what goes with them. The formulas are elsewhere, in three forms
(see `quantize/gated.py`)."""

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cache

from torch import Tensor


class GateKind(Enum):
    """The formulas that there are, of a gate `g` and an up-projection `u`."""

    SWIGLU = "swiglu"
    """`g * sigmoid(g) * u`."""
    CLAMPED_SWIGLU = "clamped_swiglu"
    """`g * sigmoid(alpha * g) * (u + up_offset)`, of `g` that is at most `limit` and `u` within `-limit..limit`."""
    POST_CLAMPED_SWIGLU = "post_clamped_swiglu"
    """`min(g * sigmoid(g), limit) * u`, of `u` within `-limit..limit`."""
    GEGLU_TANH = "geglu_tanh"
    """`gelu(g) * u`, with the approximation of GELU by `tanh`."""
    RELU_SQUARED = "relu_squared"
    """`relu(u) ** 2`: there is no gate."""


_PARAMETERS = {GateKind.CLAMPED_SWIGLU: ("limit", "alpha", "up_offset"), GateKind.POST_CLAMPED_SWIGLU: ("limit",)}
"""Their names, in the order in which every form of a gate takes them."""


@dataclass(frozen=True)
class Gate:
    """What makes one activation of a gate and an up-projection, or of an up-projection alone.

    Make one with a method below. Everything is computed in fp32. Clamps have the gradient that PyTorch's have: that of
    the identity up to the limit and at it, zero beyond.

    Raises:
        TypeError: a parameter is no number.
        ValueError: a parameter is out of range.
    """

    kind: GateKind
    parameters: tuple[float, ...] = ()
    code: str = field(init=False, repr=False, compare=False)
    """What `of_code` makes the same gate of: operators take strings."""

    def __post_init__(self) -> None:
        names = _PARAMETERS.get(self.kind, ())
        for name, value in zip(names, self.parameters, strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}; it must be a number")
            if name == "limit" and not value > 0:
                raise ValueError(f"limit is {value}; it must be positive (math.inf clamps nothing)")
            if name != "limit" and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be finite")
        object.__setattr__(self, "parameters", tuple(float(value) for value in self.parameters))
        # Made here and not where it is used: compiled code takes strings for constants, and not every number.
        object.__setattr__(self, "code", ":".join([self.kind.value, *map(repr, self.parameters)]))

    @staticmethod
    def swiglu() -> "Gate":
        """`silu(gate) * up`."""
        return Gate(GateKind.SWIGLU)

    @staticmethod
    def clamped_swiglu(limit: float, alpha: float = 1.0, up_offset: float = 0.0) -> "Gate":
        """`gate * sigmoid(alpha * gate) * (up + up_offset)`, of clamped inputs.

        gpt-oss has `clamped_swiglu(7.0, alpha=1.702, up_offset=1.0)`, DeepSeek-V4 a `limit` alone.

        Args:
            limit: positive: `gate` is clamped from above, `up` to `-limit..limit`. `math.inf` clamps nothing.
            alpha, up_offset: finite.
        """
        return Gate(GateKind.CLAMPED_SWIGLU, (limit, alpha, up_offset))

    @staticmethod
    def post_clamped_swiglu(limit: float) -> "Gate":
        """`min(silu(gate), limit) * up`, with `up` clamped to `-limit..limit`, `limit` positive: Step 3."""
        return Gate(GateKind.POST_CLAMPED_SWIGLU, (limit,))

    @staticmethod
    def geglu_tanh() -> "Gate":
        """`gelu(gate, approximate="tanh") * up`: Gemma."""
        return Gate(GateKind.GEGLU_TANH)

    @staticmethod
    def relu_squared() -> "Gate":
        """`relu(up) ** 2`, without a gate: Nemotron. The first weight of an expert is `(I, H)`."""
        return Gate(GateKind.RELU_SQUARED)

    @staticmethod
    @cache  # operators ask in every call
    def of_code(code: str) -> "Gate":
        """The gate that has this `code`."""
        kind, *parameters = code.split(":")
        return Gate(GateKind(kind), tuple(map(float, parameters)))

    @property
    def has_gate(self) -> bool:
        """Whether there is a gate beside the up-projection: whether the first weight of an expert is twice as high."""
        return self.kind is not GateKind.RELU_SQUARED

    @property
    def projections(self) -> int:
        """How many there are, of gate and up."""
        return 2 if self.has_gate else 1


SWIGLU = Gate.swiglu()


@dataclass(frozen=True, eq=False)
class GatedActivation:
    """What an expert computes between its products: its gate, and where it finds what.

    The product of an expert's first weight, `x`, holds gate and up one after the other (or up alone), each `I` features
    that zeros pad to a multiple of 128, `Ip`. Parameters and token operands are not padded.
    """

    num_features: int
    """`I`."""
    gate: Gate  # no default: traces of torch 2.11 do not know where one comes from
    bias: Tensor | None = None
    """Any float dtype `(E, 2I)`, or `(E, I)` without a gate: added to `x` in fp32 wherever `x` is read."""
    interleaved: bool = False
    """Whether parameters hold their `2I` features as `g0, u0, g1, u1, ...` instead of the gate's before up's."""

    @property
    def width(self) -> int:
        """`2I`, or `I` without a gate."""
        return self.gate.projections * self.num_features

    @property
    def padded_features(self) -> int:
        """`Ip`."""
        return (self.num_features + 127) // 128 * 128

    def with_bias(self, bias: Tensor | None) -> "GatedActivation":
        """The same, with this bias or, if None, without any."""
        return self if bias is self.bias else GatedActivation(self.num_features, self.gate, bias, self.interleaved)
