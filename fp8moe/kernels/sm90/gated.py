"""The gates of `fp8moe.quantize.gated` for Gluon kernels, by their kind.

A gate is one function here, so that activation and gradients share what both compute. It repeats the operations of
`kernels/gated.py` in the same order, for the same bits, element by element: left alone, the compiler moves them about
until registers spill. Functions of elements take no constants, so a gate's parameters reach them as tensors of one
value, which the compiler takes for what they are.
"""

import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon

from fp8moe.gate import GateKind

GELU_SLOPE, GELU_CUBE, GELU_END = gl.constexpr(1.5957691216057308), gl.constexpr(0.044715), gl.constexpr(16.0)


@gluon.jit
def sigmoid(x):
    """The bits of Triton's form, in as few instructions."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
        " rcp.approx.f32 $0, e; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def at_most(x, limit):
    """NaN stays NaN, as in every function here."""
    return gl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def within(x, limit):
    return gl.maximum(at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def swiglu_of_element(gate, up, d_act, weight):
    gate, up, d_act = gate.to(gl.float32), up.to(gl.float32), d_act.to(gl.float32)
    gate_sigmoid = sigmoid(gate)
    swish = gate * gate_sigmoid
    unweighted = swish * up
    weighted = d_act * weight
    slope = gate_sigmoid * gl.fma(gate, 1.0 - gate_sigmoid, 1.0)
    return unweighted * weight, weighted * up * slope, weighted * swish, d_act * unweighted


@gluon.jit
def swiglu(gate, up, d_act, weight, PARAMETERS: gl.constexpr):
    return gl.map_elementwise(swiglu_of_element, gate, up, d_act, weight)


@gluon.jit
def clamped_swiglu_of_element(gate, up, d_act, weight, limit, alpha, up_offset):
    gate, up, d_act = gate.to(gl.float32), up.to(gl.float32), d_act.to(gl.float32)
    clamped = at_most(gate, limit)
    inner = clamped * alpha
    gate_sigmoid = sigmoid(inner)
    swish = clamped * gate_sigmoid
    moved_up = within(up, limit) + up_offset
    unweighted = swish * moved_up
    weighted = d_act * weight
    slope = gl.where(gate > limit, 0.0, gate_sigmoid * gl.fma(inner, 1.0 - gate_sigmoid, 1.0))
    up_slope = gl.where(gl.abs(up) > limit, 0.0, swish)
    return unweighted * weight, weighted * moved_up * slope, weighted * up_slope, d_act * unweighted


@gluon.jit
def clamped_swiglu(gate, up, d_act, weight, PARAMETERS: gl.constexpr):
    limit = gl.full([128, 128], PARAMETERS[0], gl.float32, weight.type.layout)
    alpha = gl.full([128, 128], PARAMETERS[1], gl.float32, weight.type.layout)
    up_offset = gl.full([128, 128], PARAMETERS[2], gl.float32, weight.type.layout)
    return gl.map_elementwise(clamped_swiglu_of_element, gate, up, d_act, weight, limit, alpha, up_offset)


@gluon.jit
def post_clamped_swiglu_of_element(gate, up, d_act, weight, limit):
    gate, up, d_act = gate.to(gl.float32), up.to(gl.float32), d_act.to(gl.float32)
    gate_sigmoid = sigmoid(gate)
    swish = gate * gate_sigmoid
    clamped, clamped_up = at_most(swish, limit), within(up, limit)
    unweighted = clamped * clamped_up
    weighted = d_act * weight
    slope = gl.where(swish > limit, 0.0, gate_sigmoid * gl.fma(gate, 1.0 - gate_sigmoid, 1.0))
    up_slope = gl.where(gl.abs(up) > limit, 0.0, clamped)
    return unweighted * weight, weighted * clamped_up * slope, weighted * up_slope, d_act * unweighted


@gluon.jit
def post_clamped_swiglu(gate, up, d_act, weight, PARAMETERS: gl.constexpr):
    limit = gl.full([128, 128], PARAMETERS[0], gl.float32, weight.type.layout)
    return gl.map_elementwise(post_clamped_swiglu_of_element, gate, up, d_act, weight, limit)


@gluon.jit
def geglu_tanh_of_element(gate, up, d_act, weight):
    gate, up, d_act = gate.to(gl.float32), up.to(gl.float32), d_act.to(gl.float32)
    near = within(gate, GELU_END)
    scaled, square = near * GELU_SLOPE, near * near
    gate_sigmoid = sigmoid(scaled * gl.fma(square, GELU_CUBE, 1.0))
    swish = gate * gate_sigmoid
    unweighted = swish * up
    weighted = d_act * weight
    inner_slope = scaled * gl.fma(square, 3 * GELU_CUBE, 1.0)
    slope = gate_sigmoid * gl.fma(inner_slope, 1.0 - gate_sigmoid, 1.0)
    return unweighted * weight, weighted * up * slope, weighted * swish, d_act * unweighted


@gluon.jit
def geglu_tanh(gate, up, d_act, weight, PARAMETERS: gl.constexpr):
    return gl.map_elementwise(geglu_tanh_of_element, gate, up, d_act, weight)


GATES = {
    GateKind.SWIGLU: swiglu,
    GateKind.CLAMPED_SWIGLU: clamped_swiglu,
    GateKind.POST_CLAMPED_SWIGLU: post_clamped_swiglu,
    GateKind.GEGLU_TANH: geglu_tanh,
}
"""`(gate, up, d_act, weight, PARAMETERS)`, tensors of one layout but for the last, to the weighted activation, the
gradients of gate and up, and the terms of the row weight's gradient, all fp32."""
