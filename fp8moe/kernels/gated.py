"""The gates of `fp8moe.quantize.gated` for Triton kernels, by their kind, and how kernels load what they take.

Every Triton kernel that makes an activation takes it from here, so all of them have the same bits, fused or not.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import KernelInterface

from fp8moe.gate import Gate, GatedActivation, GateKind
from fp8moe.kernels.activations import load_row_weights, load_rows, load_stored_rows

GELU_SLOPE, GELU_CUBE, GELU_END = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715), tl.constexpr(16.0)


class DeviceGate(NamedTuple):
    """The device functions of a gate; all that they take and give is fp32, but for the gate's parameters.

    Sums of products are fused by hand: every kernel rounds alike. Without a gate, `gate` is anything and `d_gate` too.
    """

    activation: KernelInterface
    """`(gate, up, PARAMETERS)` to the activation, without the row's weight."""
    gradients: KernelInterface
    """`(d_act, gate, up, PARAMETERS)` to `d_gate, d_up`."""


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`. `tl.exp2` flushes subnormal results, which are lost beside 1 anyway; `tl.exp` takes
    four instructions more for the same bits."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def at_most(x, limit):
    """NaN stays NaN, as in every function here."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def within(x, limit):
    return tl.maximum(at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def swiglu(gate, up, PARAMETERS: tl.constexpr):
    return gate * sigmoid(gate) * up


@triton.jit
def swiglu_gradients(d_act, gate, up, PARAMETERS: tl.constexpr):
    gate_sigmoid = sigmoid(gate)
    slope = gate_sigmoid * tl.fma(gate, 1.0 - gate_sigmoid, 1.0)
    return d_act * up * slope, d_act * (gate * gate_sigmoid)


@triton.jit
def clamped_swiglu(gate, up, PARAMETERS: tl.constexpr):
    limit: tl.constexpr = PARAMETERS[0]
    alpha: tl.constexpr = PARAMETERS[1]
    up_offset: tl.constexpr = PARAMETERS[2]
    clamped = at_most(gate, limit)
    return clamped * sigmoid(clamped * alpha) * (within(up, limit) + up_offset)


@triton.jit
def clamped_swiglu_gradients(d_act, gate, up, PARAMETERS: tl.constexpr):
    limit: tl.constexpr = PARAMETERS[0]
    alpha: tl.constexpr = PARAMETERS[1]
    up_offset: tl.constexpr = PARAMETERS[2]
    clamped = at_most(gate, limit)
    inner = clamped * alpha
    gate_sigmoid = sigmoid(inner)
    slope = tl.where(gate > limit, 0.0, gate_sigmoid * tl.fma(inner, 1.0 - gate_sigmoid, 1.0))
    up_slope = tl.where(tl.abs(up) > limit, 0.0, clamped * gate_sigmoid)
    return d_act * (within(up, limit) + up_offset) * slope, d_act * up_slope


@triton.jit
def post_clamped_swiglu(gate, up, PARAMETERS: tl.constexpr):
    limit: tl.constexpr = PARAMETERS[0]
    return at_most(gate * sigmoid(gate), limit) * within(up, limit)


@triton.jit
def post_clamped_swiglu_gradients(d_act, gate, up, PARAMETERS: tl.constexpr):
    limit: tl.constexpr = PARAMETERS[0]
    gate_sigmoid = sigmoid(gate)
    swish = gate * gate_sigmoid
    slope = tl.where(swish > limit, 0.0, gate_sigmoid * tl.fma(gate, 1.0 - gate_sigmoid, 1.0))
    up_slope = tl.where(tl.abs(up) > limit, 0.0, at_most(swish, limit))
    return d_act * within(up, limit) * slope, d_act * up_slope


@triton.jit
def geglu_tanh(gate, up, PARAMETERS: tl.constexpr):
    near = within(gate, GELU_END)
    return gate * sigmoid(near * GELU_SLOPE * tl.fma(near * near, GELU_CUBE, 1.0)) * up


@triton.jit
def geglu_tanh_gradients(d_act, gate, up, PARAMETERS: tl.constexpr):
    near = within(gate, GELU_END)
    scaled, square = near * GELU_SLOPE, near * near
    gate_sigmoid = sigmoid(scaled * tl.fma(square, GELU_CUBE, 1.0))
    inner_slope = scaled * tl.fma(square, 3 * GELU_CUBE, 1.0)
    slope = gate_sigmoid * tl.fma(inner_slope, 1.0 - gate_sigmoid, 1.0)
    return d_act * up * slope, d_act * (gate * gate_sigmoid)


@triton.jit
def relu_squared(gate, up, PARAMETERS: tl.constexpr):
    positive = tl.maximum(up, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def relu_squared_gradients(d_act, gate, up, PARAMETERS: tl.constexpr):
    d_up = d_act * (tl.maximum(up, 0.0, propagate_nan=tl.PropagateNan.ALL) * 2.0)
    return d_up, d_up


GATES = {
    GateKind.SWIGLU: DeviceGate(swiglu, swiglu_gradients),
    GateKind.CLAMPED_SWIGLU: DeviceGate(clamped_swiglu, clamped_swiglu_gradients),
    GateKind.POST_CLAMPED_SWIGLU: DeviceGate(post_clamped_swiglu, post_clamped_swiglu_gradients),
    GateKind.GEGLU_TANH: DeviceGate(geglu_tanh, geglu_tanh_gradients),
    GateKind.RELU_SQUARED: DeviceGate(relu_squared, relu_squared_gradients),
}


def constants_of(gate: Gate) -> dict[str, Any]:
    """What every kernel takes of a gate."""
    return {"PARAMETERS": gate.parameters, "ACTIVATION": GATES[gate.kind].activation, "HAS_GATE": gate.has_gate}


def live_features(act: GatedActivation) -> int | None:
    """`I` where zeros pad it, else None: kernels are compiled without masks where all features are live."""
    return None if act.num_features == act.padded_features else act.num_features


@triton.jit
def live_of(NUM_FEATURES, LIVE):
    """`I`, which is `NUM_FEATURES` where `LIVE` is None."""
    if LIVE is None:
        return NUM_FEATURES
    else:
        return LIVE


@triton.jit
def rows_of_parameter(features, HALF: tl.constexpr, NUM_FEATURES, LIVE, INTERLEAVED: tl.constexpr):
    """Where a parameter holds these features of the gate (`HALF` 0) or of up (1)."""
    if INTERLEAVED:
        rows = features * 2 + HALF
    elif HALF == 1:
        rows = live_of(NUM_FEATURES, LIVE) + features
    else:
        rows = features
    return rows


@triton.jit
def load_live(pointer, features, at, LIVE):
    """fp32, of these features, which lie `at` there; zeros past the live ones."""
    if LIVE is None:
        values = tl.load(pointer + at)
    else:
        values = tl.load(pointer + at, mask=features < LIVE, other=0.0)
    return values.to(tl.float32)


@triton.jit
def store_live(pointer, features, at, values, LIVE):
    """Store `values` of these features, which lie `at` there, but for those past the live ones."""
    if LIVE is None:
        tl.store(pointer + at, values)
    else:
        tl.store(pointer + at, values, mask=features < LIVE)


@triton.jit
def load_biases(bias, expert, features, NUM_FEATURES, LIVE, HAS_GATE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """fp32, of these features of an expert's gate and up; without a gate, twice the same."""
    if HAS_GATE:
        first = bias + expert.to(tl.int64) * (2 * live_of(NUM_FEATURES, LIVE))
        gate_rows = rows_of_parameter(features, 0, NUM_FEATURES, LIVE, INTERLEAVED)
        up_rows = rows_of_parameter(features, 1, NUM_FEATURES, LIVE, INTERLEAVED)
        gate_bias = load_live(first, features, gate_rows, LIVE)
        up_bias = load_live(first, features, up_rows, LIVE)
    else:
        gate_bias = load_live(bias + expert.to(tl.int64) * live_of(NUM_FEATURES, LIVE), features, features, LIVE)
        up_bias = gate_bias
    return gate_bias, up_bias


@triton.jit
def load_half(
    x, x_scale, source, rows, features, feature_block, HALF: tl.constexpr, stride_row, NUM_FEATURES, CAPACITY
):  # fmt: skip
    """fp32 `(rows, features)`, of the gate (`HALF` 0) or of up (1): the rows `source` of `x`, zeros where that is -1;
    or, with an `x_scale`, the padded rows `rows` of a row operand. The features lie in one block."""
    if HALF == 1:
        x = x + NUM_FEATURES
        feature_block = feature_block + NUM_FEATURES // 128
    if x_scale is None:
        half = load_rows(x, source, features, stride_row, 1)
    else:
        half = load_stored_rows(x, x_scale, rows, features, feature_block, stride_row, CAPACITY)
    return half


@triton.jit
def load_gate_up(
    x, x_scale, source, rows, features, feature_block, stride_row, NUM_FEATURES, CAPACITY, HAS_GATE: tl.constexpr
):  # fmt: skip
    """Both halves of `load_half`; without a gate, twice the same."""
    gate = load_half(x, x_scale, source, rows, features, feature_block, 0, stride_row, NUM_FEATURES, CAPACITY)
    if HAS_GATE:
        up = load_half(x, x_scale, source, rows, features, feature_block, 1, stride_row, NUM_FEATURES, CAPACITY)
    else:
        up = gate
    return gate, up


@triton.jit
def add_biases(gate, up, gate_bias, up_bias):
    """To gate and up `(rows, features)`, on padding too; nothing where the biases are None."""
    if gate_bias is not None:
        gate = gate + gate_bias[None, :]
        up = up + up_bias[None, :]
    return gate, up


@triton.jit
def weights_of_rows(row_weights, source, bias):
    """fp32, one for each of the rows `source`. With a bias they are zeros on padding in any case, where the activation
    is not."""
    weights = load_row_weights(row_weights, source)
    if bias is not None:
        weights = tl.where(source >= 0, weights, 0.0)
    return weights


def contiguous_bias(act: GatedActivation) -> Tensor | None:
    """As kernels take it."""
    return None if act.bias is None else act.bias.contiguous()
