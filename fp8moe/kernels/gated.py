"""Device functions shared by the SwiGLU kernels: the Triton twin of `swiglu_reference`.

Every Triton kernel that makes an activation makes it here, so that all of them have the same bits, fused or not; the
Gluon kernel (`swiglu_backward_hopper.py`) repeats the operations.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`. `tl.exp2` flushes subnormal results, which are nothing beside 1; `tl.exp` takes four
    instructions more for the same bits."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def swiglu(gate, up, weight, ROUND_THROUGH_BF16: tl.constexpr):
    """The activation, fp32."""
    act = gate * sigmoid(gate) * up * weight
    if ROUND_THROUGH_BF16:
        act = act.to(tl.bfloat16).to(tl.float32)
    return act


@triton.jit
def swiglu_backward(d_act, gate, up, weight):
    """`d_gate` and `d_up`, fp32. The one sum is fused by hand, so that every kernel rounds it alike."""
    gate_sigmoid = sigmoid(gate)
    weighted = d_act * weight
    slope = gate_sigmoid * tl.fma(gate, 1.0 - gate_sigmoid, 1.0)
    return weighted * up * slope, weighted * (gate * gate_sigmoid)


@triton.jit
def load_weights(row_weights, source):
    """fp32, one for each of the rows `source`: ones if there are no weights, zeros on padding (-1)."""
    if row_weights is None:
        weights = tl.full(source.shape, 1.0, tl.float32)
    else:
        weights = tl.load(row_weights + source, mask=source >= 0, other=0.0).to(tl.float32)
    return weights
