"""The gates of `fp8moe.quantize.gated` for Triton kernels, by the value of `Gate`.

Every Triton kernel that makes an activation takes it from here, so all of them have the same bits, fused or not.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime import KernelInterface


class DeviceGate(NamedTuple):
    """The device functions of a gate; all that they take and give is fp32."""

    activation: KernelInterface
    """`(gate, up)` to the activation, without the row's weight."""
    gradients: KernelInterface
    """`(d_act, gate, up)` to `d_gate, d_up`. Sums of products are fused by hand: every kernel rounds alike."""


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`. `tl.exp2` flushes subnormal results, which are lost beside 1 anyway; `tl.exp` takes
    four instructions more for the same bits."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def swiglu(gate, up):
    return gate * sigmoid(gate) * up


@triton.jit
def swiglu_gradients(d_act, gate, up):
    gate_sigmoid = sigmoid(gate)
    slope = gate_sigmoid * tl.fma(gate, 1.0 - gate_sigmoid, 1.0)
    return d_act * up * slope, d_act * (gate * gate_sigmoid)


GATES = {"swiglu": DeviceGate(swiglu, swiglu_gradients)}
