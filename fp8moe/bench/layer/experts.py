"""What the experts of a measured layer are like, apart from their sizes."""

from dataclasses import dataclass

from fp8moe.gate import SWIGLU, Gate


@dataclass(frozen=True)
class Experts:
    """All but their sizes."""

    gate: Gate = SWIGLU
    biases: bool = False
    """Whether both projections have one."""
    interleaved: bool = False
    """Whether gate and up lie by turns, not one after the other."""
    transposed: bool = False
    """Whether weights lie in memory as `(E, K, N)`. Adding to a `main_grad` of that layout is beyond `moe_forward`."""


PLAIN = Experts()
GPT_OSS = Experts(Gate.clamped_swiglu(7.0, alpha=1.702, up_offset=1.0), biases=True, interleaved=True, transposed=True)
EXPERTS = {"gpt-oss": GPT_OSS}
"""Those that are not plain, by what the names of their layers begin with."""


def experts_of(name: str) -> Experts:
    """Of the layer of this name."""
    return next((experts for start, experts in EXPERTS.items() if name.startswith(start)), PLAIN)
