"""Kernels: the activation of experts that compute in BF16, and its gradients, each input read once."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.gate import Gate
from fp8moe.kernels.gated import GATES, constants_of
from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from

ELEMENTS = 1024  # of a program's tile: 16 bytes of bf16 a thread


@triton.jit
def rows_of_choices(choice_row, choices, NUM_CHOICES):
    """int64, the rows of these choices, -1 for none; without `choice_row` choices are rows."""
    if choice_row is None:
        rows = tl.where(choices < NUM_CHOICES, choices, -1)
    else:
        rows = tl.load(choice_row + choices, mask=choices < NUM_CHOICES, other=-1)
    return rows.to(tl.int64)


@triton.jit
def load_both(gate, up, offsets, inside, HAS_GATE: tl.constexpr):
    """fp32 gate and up; without a gate, twice the same."""
    second = tl.load(up + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        first = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        first = second
    return first, second


@triton.jit
def gated_kernel(
    gate, up,  # (rows, I) any float dtype, of the same strides; without a gate, that is None
    weights,  # (choices,) any float dtype, or None
    choice_row,  # int32 (choices,), or None: each row is a choice
    act,  # (rows, I) contiguous
    stride_row, stride_feature, NUM_CHOICES, NUM_FEATURES,
    ACTIVATION: tl.constexpr, PARAMETERS: tl.constexpr, HAS_GATE: tl.constexpr,
    CHOICES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One program does the rows of CHOICES choices x FEATURES features."""
    blocks = tl.cdiv(NUM_FEATURES, FEATURES)
    choices = tl.program_id(0) // blocks * CHOICES + tl.arange(0, CHOICES)
    features = tl.program_id(0) % blocks * FEATURES + tl.arange(0, FEATURES)
    rows = rows_of_choices(choice_row, choices, NUM_CHOICES)
    inside = (rows >= 0)[:, None] & (features < NUM_FEATURES)[None, :]
    offsets = rows[:, None] * stride_row + features[None, :] * stride_feature
    first, second = load_both(gate, up, offsets, inside, HAS_GATE)
    made = ACTIVATION(first, second, PARAMETERS)
    if weights is not None:
        made *= tl.load(weights + choices, mask=rows >= 0, other=0.0).to(tl.float32)[:, None]
    tl.store(act + rows[:, None] * NUM_FEATURES + features[None, :], made, mask=inside)


@triton.jit
def gated_backward_kernel(
    d_act,  # (rows, I) contiguous
    gate, up, weights, choice_row,  # as above
    d_gate, d_up,  # as gate and up
    d_weights,  # fp32 (choices,), or None
    stride_row, stride_feature, NUM_CHOICES, NUM_FEATURES,
    ACTIVATION: tl.constexpr, GRADIENTS: tl.constexpr, PARAMETERS: tl.constexpr, HAS_GATE: tl.constexpr,
    CHOICES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One program does the whole rows of CHOICES choices, FEATURES features at a time."""
    choices = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    rows = rows_of_choices(choice_row, choices, NUM_CHOICES)
    if weights is not None:
        weight = tl.load(weights + choices, mask=rows >= 0, other=0.0).to(tl.float32)[:, None]
    sums = tl.zeros((CHOICES,), tl.float32)
    for start in range(0, NUM_FEATURES, FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = (rows >= 0)[:, None] & (features < NUM_FEATURES)[None, :]
        offsets = rows[:, None] * stride_row + features[None, :] * stride_feature
        first, second = load_both(gate, up, offsets, inside, HAS_GATE)
        places = d_act + rows[:, None] * NUM_FEATURES + features[None, :]
        gradient = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        if d_weights is not None:
            sums += tl.sum(gradient * ACTIVATION(first, second, PARAMETERS), 1)
        if weights is not None:
            gradient *= weight
        d_first, d_second = GRADIENTS(gradient, first, second, PARAMETERS)
        if HAS_GATE:
            tl.store(d_gate + offsets, d_first, mask=inside)
        tl.store(d_up + offsets, d_second, mask=inside)
    if d_weights is not None:
        tl.store(d_weights + choices, sums, mask=choices < NUM_CHOICES)


def launch_gated(
    gate: Tensor | None, up: Tensor, weights: Tensor | None, choice_row: Tensor | None, act: Tensor, of: Gate
) -> None:
    """The activation `of` gate and up, times the weights, to `act`; tensors as in the kernel."""
    num_choices, num_features = act.shape
    tile = _tile(num_features)
    blocks = ceil_div(num_choices, tile["CHOICES"]) * ceil_div(num_features, tile["FEATURES"])
    if blocks == 0:
        return
    launch(
        gated_kernel, blocks,
        gate, up, weights, choice_row, act, up.stride(0), up.stride(1), num_choices, num_features,
        **constants_of(of), **tile, num_warps=4,
    )  # fmt: skip


def launch_gated_backward(
    d_act: Tensor, gate: Tensor | None, up: Tensor, weights: Tensor | None, choice_row: Tensor | None,
    d_gate: Tensor | None, d_up: Tensor, d_weights: Tensor | None, of: Gate,
) -> None:  # fmt: skip
    """The gradients from that of `launch_gated`'s result; tensors as in the kernel."""
    num_choices, num_features = d_act.shape
    tile = _tile(num_features)
    blocks = ceil_div(num_choices, tile["CHOICES"])
    if blocks == 0:
        return
    launch(
        gated_backward_kernel, blocks,
        d_act, gate, up, weights, choice_row, d_gate, d_up, d_weights,
        up.stride(0), up.stride(1), num_choices, num_features,
        **constants_of(of), GRADIENTS=GATES[of.kind].gradients, **tile, num_warps=4,
    )  # fmt: skip


def _tile(num_features: int) -> dict[str, int]:
    features = min(power_of_2_from(num_features), ELEMENTS)
    return {"CHOICES": ELEMENTS // features, "FEATURES": features}
