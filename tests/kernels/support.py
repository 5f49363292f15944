"""What the kernels' tests share."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.devices import runs_hopper_kernels
from fp8moe.gate import SWIGLU, Gate
from fp8moe.kernels.gated import constants_of

GATES = (
    Gate.swiglu(),
    Gate.clamped_swiglu(7.0, alpha=1.702, up_offset=1.0),
    Gate.clamped_swiglu(1.5),
    Gate.post_clamped_swiglu(1.5),
    Gate.geglu_tanh(),
    Gate.relu_squared(),
)
"""One of each kind, and one with other parameters."""
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and runs_hopper_kernels(torch.device("cuda"))), reason="needs a Hopper GPU"
)
"""For kernels in Gluon, which cannot be interpreted."""


@triton.jit
def activation_kernel(  # type: ignore[no-untyped-def]
    x, row_weights, act, stride_row, NUM_FEATURES,
    ACTIVATION: tl.constexpr, PARAMETERS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """One program makes 128 features of a row."""
    row = (tl.program_id(0) // (NUM_FEATURES // 128)).to(tl.int64)
    features = tl.program_id(0) % (NUM_FEATURES // 128) * 128 + tl.arange(0, 128)
    gate = tl.load(x + row * stride_row + features).to(tl.float32)
    up = gate
    if HAS_GATE:
        up = tl.load(x + row * stride_row + NUM_FEATURES + features).to(tl.float32)
    made = ACTIVATION(gate, up, PARAMETERS)
    if row_weights is not None:
        made = made * tl.load(row_weights + row).to(tl.float32)
    tl.store(act + row * NUM_FEATURES + features, made)


def device_activation(x: Tensor, row_weights: Tensor | None, gate: Gate = SWIGLU) -> Tensor:
    """fp32 `(rows, I)`: the activation with the bits that every fused kernel gives it before it quantizes it."""
    num_rows, num_features = x.shape[0], x.shape[1] // gate.projections
    act = torch.empty(num_rows, num_features, device=x.device)
    if act.numel():
        grid = (num_rows * (num_features // 128),)
        activation_kernel[grid](x, row_weights, act, x.stride(0), num_features, **constants_of(gate))
    return act
