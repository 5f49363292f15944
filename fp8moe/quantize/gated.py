"""The definition of each gate in plain PyTorch: the activation of gate and up, and its derivatives.

A gate has three forms, each with one entry a kind: this one, `kernels/gated.py` (Triton) and `kernels/sm90/gated.py`
(Gluon). No kernel or operator names a gate. What makes nothing of a gate takes None for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8moe.gate import Gate, GateKind


def activation(of: Gate, gate: Tensor | None, up: Tensor) -> Tensor:
    """Of gate and up, of one float dtype and shape; `gate` is None where `of` has none."""
    return _FORMULAS[of.kind].activation(gate, up, *of.parameters)


def gradients(of: Gate, d_act: Tensor, gate: Tensor | None, up: Tensor) -> tuple[Tensor | None, Tensor]:
    """The gradients of gate (None where there is none) and up from that of the activation, all of one dtype and
    shape."""
    return _FORMULAS[of.kind].gradients(d_act, gate, up, *of.parameters)


class _Formula(NamedTuple):
    activation: Callable[..., Tensor]
    """Of gate, up, and the parameters of the gate."""
    gradients: Callable[..., tuple[Any, Tensor]]
    """Of the activation's gradient, gate, up, and the parameters of the gate."""


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def _swiglu_gradients(d_act: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(gate)
    return d_act * up * (sigmoid * (1 + gate * (1 - sigmoid))), d_act * (gate * sigmoid)


def _clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float, up_offset: float) -> Tensor:
    clamped = gate.clamp(max=limit)
    return clamped * torch.sigmoid(clamped * alpha) * (up.clamp(-limit, limit) + up_offset)


def _clamped_swiglu_gradients(
    d_act: Tensor, gate: Tensor, up: Tensor, limit: float, alpha: float, up_offset: float
) -> tuple[Tensor, Tensor]:
    clamped = gate.clamp(max=limit)
    inner = clamped * alpha
    sigmoid = torch.sigmoid(inner)
    slope = (sigmoid * (1 + inner * (1 - sigmoid))).masked_fill(gate > limit, 0.0)
    up_slope = (clamped * sigmoid).masked_fill(up.abs() > limit, 0.0)
    return d_act * (up.clamp(-limit, limit) + up_offset) * slope, d_act * up_slope


def _post_clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return (gate * torch.sigmoid(gate)).clamp(max=limit) * up.clamp(-limit, limit)


def _post_clamped_swiglu_gradients(d_act: Tensor, gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(gate)
    swish = gate * sigmoid
    slope = (sigmoid * (1 + gate * (1 - sigmoid))).masked_fill(swish > limit, 0.0)
    up_slope = swish.clamp(max=limit).masked_fill(up.abs() > limit, 0.0)
    return d_act * up.clamp(-limit, limit) * slope, d_act * up_slope


GELU_SLOPE, GELU_CUBE, GELU_END = 1.5957691216057308, 0.044715, 16.0
"""`gelu(x) = x / 2 * (1 + tanh(z)) = x * sigmoid(2 * z)`, `2 * z = SLOPE * x * (1 + CUBE * x**2)`, `SLOPE` twice the
root of `2 / pi`. From `END` on the sigmoid is 0 or 1 in fp32, and the cube would overflow far beyond."""


def _geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    near = gate.clamp(-GELU_END, GELU_END)
    return gate * torch.sigmoid(near * GELU_SLOPE * (1 + near * near * GELU_CUBE)) * up


def _geglu_tanh_gradients(d_act: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    near = gate.clamp(-GELU_END, GELU_END)
    scaled, square = near * GELU_SLOPE, near * near
    sigmoid = torch.sigmoid(scaled * (1 + square * GELU_CUBE))
    inner_slope = scaled * (1 + square * (3 * GELU_CUBE))
    return d_act * up * (sigmoid * (1 + inner_slope * (1 - sigmoid))), d_act * (gate * sigmoid)


def _relu_squared(_: None, up: Tensor) -> Tensor:
    return up.relu() * up.relu()


def _relu_squared_gradients(d_act: Tensor, _: None, up: Tensor) -> tuple[None, Tensor]:
    return None, d_act * (up.relu() * 2)


_FORMULAS = {
    GateKind.SWIGLU: _Formula(_swiglu, _swiglu_gradients),
    GateKind.CLAMPED_SWIGLU: _Formula(_clamped_swiglu, _clamped_swiglu_gradients),
    GateKind.POST_CLAMPED_SWIGLU: _Formula(_post_clamped_swiglu, _post_clamped_swiglu_gradients),
    GateKind.GEGLU_TANH: _Formula(_geglu_tanh, _geglu_tanh_gradients),
    GateKind.RELU_SQUARED: _Formula(_relu_squared, _relu_squared_gradients),
}
