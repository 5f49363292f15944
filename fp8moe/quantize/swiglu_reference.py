"""The definition of SwiGLU fused with quantization, in plain PyTorch.

In fp32, operation by operation, with the row's weight `w` (left out where there is none):

    act    = gate * sigmoid(gate) * up * w                                 rounded to bf16 first, if asked for
    d_gate = d_act * w * up * (sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))))
    d_up   = d_act * w * (gate * sigmoid(gate))
    d_w    = sum of d_act * (gate * sigmoid(gate) * up) over the features

What comes out is quantized as `reference.py` defines. A kernel computes the sigmoid with an exponential of its own, so
it may differ: by one code in at most 1e-4 of the elements, and by 2 units in the last place of a scale (rarely by up to
8; where `1 + gate * (1 - sigmoid)` cancels, by units of what is cancelled).
"""

from enum import Enum

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import TokenGroups
from fp8moe.quantize import reference


class GateUpLayout(Enum):
    """Which half of the features `(rows, 2I)` is the gate."""

    GATE_UP = "gate_up"
    UP_GATE = "up_gate"

    def starts(self, num_features: int) -> tuple[int, int]:
        """The first column of the gate and of the up-projection, `num_features` (`I`) columns each."""
        return (0, num_features) if self is GateUpLayout.GATE_UP else (num_features, 0)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(rows, 2I)` in any float dtype to gate and up, fp32 `(rows, I)` each."""
        halves = x.float().chunk(2, dim=1)
        return (halves[0], halves[1]) if self is GateUpLayout.GATE_UP else (halves[1], halves[0])

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([gate, up] if self is GateUpLayout.GATE_UP else [up, gate], dim=1)


def swiglu(x: Tensor, halves: GateUpLayout, row_weights: Tensor | None, round_through_bf16: bool) -> Tensor:
    """The activation in fp32 `(rows, I)`.

    Args:
        x: bf16, fp16 or fp32 `(rows, 2I)`.
        halves: which half is the gate.
        row_weights: any float dtype `(rows,)`.
        round_through_bf16: round to bf16, as if the activation had been stored.
    """
    gate, up = halves.split(x)
    act = gate * torch.sigmoid(gate) * up
    if row_weights is not None:
        act = act * row_weights.float()[:, None]
    return act.bfloat16().float() if round_through_bf16 else act


def swiglu_backward(
    d_act: Tensor, x: Tensor, halves: GateUpLayout, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of `x`, fp32 `(rows, 2I)`, and of the row weights, fp32 `(rows,)`; arguments as in `swiglu`."""
    gate, up = halves.split(x)
    d_act = d_act.float()
    sigmoid = torch.sigmoid(gate)
    d_row_weights = (d_act * (gate * sigmoid * up)).sum(1)
    if row_weights is not None:
        d_act = d_act * row_weights.float()[:, None]
    d_gate = d_act * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    return halves.join(d_gate, d_act * (gate * sigmoid)), d_row_weights


def zero_rows_of_no_group(values: Tensor, groups: TokenGroups) -> Tensor:
    """`values` `(rows,)`, with zeros where no padded row copies the row."""
    (num_rows,) = values.shape
    # One slot more takes what padding points at: nothing here waits for the device.
    index = torch.where(groups.row_source < 0, num_rows, groups.row_source).long()
    live = torch.zeros(num_rows + 1, dtype=torch.bool, device=values.device).index_fill_(0, index, True)
    return torch.where(live[:num_rows], values, 0.0)


def quantize_in_groups(x: Tensor, group_size: int, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """fp32 `(rows, I)` to e4m3 `(rows, I)` and scales fp32 `(rows, I / group_size)`: tiles of 1 x `group_size`."""
    num_rows, num_features = x.shape
    tiles = x.reshape(num_rows, num_features // group_size, group_size)
    data, scale = reference.quantize_tiles(tiles, (2,), scale_format)
    return data.view(num_rows, num_features), scale.squeeze(2)
