"""The gates of `fp8moe.quantize.gated` for Gluon kernels, by their kind.

A gate is one function here, so that activation and gradients share what both compute. It repeats the operations of
`kernels/gated.py` in the same order, for the same bits, element by element: left alone, the compiler moves them about
until registers spill. Clamped gates and GELU spilled 48 to 72 bytes a thread with Triton 3.6, so they are not here: the
Triton kernel makes them.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from fp8moe.gate import GateKind


@gluon.jit
def sigmoid(x):
    """The bits of Triton's form, in as few instructions."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
        " rcp.approx.f32 $0, e; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


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


GATES = {GateKind.SWIGLU: swiglu}
"""`(gate, up, d_act, weight, PARAMETERS)`, tensors of one layout but for the last, to the weighted activation, the
gradients of gate and up, and the terms of the row weight's gradient, all fp32."""
