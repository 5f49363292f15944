"""The definition of each gate in plain PyTorch: the activation of gate and up, and its derivatives.

A gate has three forms, each with one entry a gate: this one, `kernels/gated.py` (Triton) and `kernels/sm90/gated.py`
(Gluon), which find theirs by the value of `Gate`. No kernel or operator names a gate.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor


class Gate(Enum):
    """What makes one activation of a gate and an up-projection."""

    SWIGLU = "swiglu"
    """`gate * sigmoid(gate) * up`."""

    def activation(self, gate: Tensor, up: Tensor) -> Tensor:
        """All fp32, of one shape."""
        return _FORMULAS[self].activation(gate, up)

    def gradients(self, d_act: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up from that of the activation, all fp32, of one shape."""
        return _FORMULAS[self].gradients(d_act, gate, up)


class _Formula(NamedTuple):
    activation: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def _swiglu_gradients(d_act: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(gate)
    return d_act * up * (sigmoid * (1 + gate * (1 - sigmoid))), d_act * (gate * sigmoid)


_FORMULAS = {Gate.SWIGLU: _Formula(_swiglu, _swiglu_gradients)}
