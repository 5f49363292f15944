"""The definition of a gated activation fused with quantization, in plain PyTorch.

In fp32, operation by operation, with the row's weight `w` (left out where there is none) and the gate's formulas:

    act            = activation(gate, up) * w
    d_gate, d_up   = gradients(d_act * w, gate, up)
    d_w            = sum of d_act * activation(gate, up) over the features

The results are quantized as `reference.py` defines. A kernel computes the sigmoid with an exponential of its own, so it
may differ: by one code in at most 1e-4 of the elements, and by 2 units in the last place of a scale (rarely by up to 8;
where `1 + gate * (1 - sigmoid)` cancels, by units of what is cancelled).
"""

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import TokenGroups
from fp8moe.quantize import reference
from fp8moe.quantize.gated import Gate


def swiglu(x: Tensor, row_weights: Tensor | None, gate: Gate = Gate.SWIGLU) -> Tensor:
    """The activation in fp32 `(rows, I)`.

    Args:
        x: bf16, fp16 or fp32 `(rows, 2I)`: gate, then up.
        row_weights: any float dtype `(rows,)`.
        gate: how gate and up make the activation.
    """
    act = gate.activation(*x.float().chunk(2, dim=1))
    return act if row_weights is None else act * row_weights.float()[:, None]


def swiglu_backward(
    d_act: Tensor, x: Tensor, row_weights: Tensor | None, gate: Gate = Gate.SWIGLU
) -> tuple[Tensor, Tensor]:
    """The gradients of `x`, fp32 `(rows, 2I)`, and of the row weights, fp32 `(rows,)`; arguments as in `swiglu`."""
    d_act = d_act.float()
    d_row_weights = (d_act * swiglu(x, None, gate)).sum(1)
    if row_weights is not None:
        d_act = d_act * row_weights.float()[:, None]
    return torch.cat(gate.gradients(d_act, *x.float().chunk(2, dim=1)), dim=1), d_row_weights


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
