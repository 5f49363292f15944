"""Kernels: the activation of experts that compute in BF16, and its gradients, each input read once."""

from collections.abc import Sequence
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.gate import Gate
from fp8moe.kernels.gated import GATES, constants_of
from fp8moe.kernels.launch import Variant, ceil_div, tile_of

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
    gate, up,  # (rows, I) any float dtype, of the same strides; without a gate, twice the same
    up_start,  # where up's features begin, elements after `up`
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
    first, second = load_both(gate, up + up_start, offsets, inside, HAS_GATE)
    made = ACTIVATION(first, second, PARAMETERS)
    if weights is not None:
        made *= tl.load(weights + choices, mask=rows >= 0, other=0.0).to(tl.float32)[:, None]
    tl.store(act + rows[:, None] * NUM_FEATURES + features[None, :], made, mask=inside)


@triton.jit
def gated_backward_kernel(
    d_act,  # (rows, I) contiguous
    gate, up, up_start, weights, choice_row,  # as above
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
        first, second = load_both(gate, up + up_start, offsets, inside, HAS_GATE)
        places = d_act + rows[:, None] * NUM_FEATURES + features[None, :]
        gradient = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        if d_weights is not None:
            sums += tl.sum(gradient * ACTIVATION(first, second, PARAMETERS), 1)
        if weights is not None:
            gradient *= weight
        d_first, d_second = GRADIENTS(gradient, first, second, PARAMETERS)
        if HAS_GATE:
            tl.store(d_gate + offsets, d_first, mask=inside)
        tl.store(d_up + up_start + offsets, d_second, mask=inside)
    if d_weights is not None:
        tl.store(d_weights + choices, sums, mask=choices < NUM_CHOICES)


def launch_gated(
    parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, act: Tensor, gate: str,
    interleaved: bool,
) -> None:  # fmt: skip
    """The activation of `parts`, times the weights, to `act`, all contiguous: `gated_in_bf16`."""
    num_choices, num_features = act.shape
    variant, choices, features = _variant(gate, num_features)
    if num_choices:
        variant.launch(
            ceil_div(num_choices, choices) * ceil_div(num_features, features),
            parts[0], parts[-1], _up_start(parts, num_features, interleaved), weights, choice_row, act,
            parts[0].shape[1], 1 + interleaved, num_choices, num_features,
        )  # fmt: skip


def launch_gated_backward(
    d_act: Tensor, parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None,
    d_parts: Sequence[Tensor], d_weights: Tensor | None, gate: str, interleaved: bool,
) -> None:  # fmt: skip
    """The gradients from that of `launch_gated`'s result, to `d_parts` and `d_weights`, all contiguous."""
    num_choices, num_features = d_act.shape
    variant, choices = _backward_variant(gate, num_features)
    if num_choices:
        variant.launch(
            ceil_div(num_choices, choices),
            d_act, parts[0], parts[-1], _up_start(parts, num_features, interleaved), weights, choice_row,
            d_parts[0], d_parts[-1], d_weights, parts[0].shape[1], 1 + interleaved, num_choices, num_features,
        )  # fmt: skip


def _up_start(parts: Sequence[Tensor], num_features: int, interleaved: bool) -> int:
    """Views of gate and up would take the host longer."""
    if interleaved:
        return 1
    return 0 if len(parts) == 2 else parts[0].shape[1] - num_features


@cache
def _variant(code: str, num_features: int) -> tuple[Variant, int, int]:
    choices, features = tile_of(num_features, ELEMENTS)
    constants = constants_of(Gate.of_code(code))
    return Variant(gated_kernel, **constants, CHOICES=choices, FEATURES=features, num_warps=4), choices, features


@cache
def _backward_variant(code: str, num_features: int) -> tuple[Variant, int]:
    choices, features = tile_of(num_features, ELEMENTS)
    gate = Gate.of_code(code)
    constants = constants_of(gate) | {"GRADIENTS": GATES[gate.kind].gradients}
    return Variant(gated_backward_kernel, **constants, CHOICES=choices, FEATURES=features, num_warps=4), choices
