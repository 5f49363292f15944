"""The definition of a gated activation fused with quantization, in plain PyTorch.

In fp32, operation by operation, with the row's weight `w` and the expert's bias (left out where there is none), and the
gate's formulas:

    gate, up       = x + bias
    act            = activation(gate, up) * w
    d_gate, d_up   = gradients(d_act * w, gate, up)
    d_w            = sum of d_act * activation(gate, up) over the features
    d_bias         = sum of d_gate, d_up over the rows of an expert

The results are quantized as `reference.py` defines. A kernel computes the sigmoid with an exponential of its own, so it
may differ: by one code in at most 1e-4 of the elements, and by 2 units in the last place of a scale (rarely by up to 8;
where `1 + gate * (1 - sigmoid)` cancels, by units of what is cancelled).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.gate import SWIGLU, GatedActivation
from fp8moe.operands import BLOCK, RowOperand, TokenGroups
from fp8moe.quantize import reference
from fp8moe.quantize.gated import activation, gradients


def swiglu(
    x: Tensor, row_weights: Tensor | None, act: GatedActivation | None = None, groups: TokenGroups | None = None
) -> Tensor:
    """The activation in fp32 `(rows, I)`.

    Args:
        x: bf16, fp16 or fp32 `(rows, 2Ip)`: gate, then up; `(rows, Ip)` without a gate.
        row_weights: any float dtype `(rows,)`.
        act: what to compute; None: SwiGLU of all features, without a bias.
        groups: which expert each row belongs to, for the bias.
    """
    act = act or plain_swiglu(x)
    values = activation(act.gate, *gate_and_up(x, act, groups))
    return values if row_weights is None else values * row_weights.float()[:, None]


def swiglu_backward(
    d_act: Tensor,
    x: Tensor,
    row_weights: Tensor | None,
    act: GatedActivation | None = None,
    groups: TokenGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x`, fp32 `(rows, 2I)`, the gate's before up's, and of the row weights, fp32 `(rows,)`; `d_act`
    is `(rows, Ip)`, the other arguments as in `swiglu`."""
    act = act or plain_swiglu(x)
    d_row_weights = (d_act[:, : act.num_features].float() * swiglu(x, None, act, groups)).sum(1)
    return gate_up_gradient(d_act, x, row_weights, act, groups), d_row_weights


def gate_up_gradient(
    d_act: Tensor, x: Tensor, row_weights: Tensor | None, act: GatedActivation, groups: TokenGroups | None
) -> Tensor:  # fmt: skip
    """The first of the gradients of `swiglu_backward` alone."""
    d_act = d_act[:, : act.num_features].float()
    if row_weights is not None:
        d_act = d_act * row_weights.float()[:, None]
    d_gate, d_up = gradients(act.gate, d_act, *gate_and_up(x, act, groups))
    return d_up if d_gate is None else torch.cat([d_gate, d_up], dim=1)


def weight_gradient_parts(d_act: Tensor, x: Tensor, act: GatedActivation, groups: TokenGroups) -> Tensor:
    """The gradient of the row weights, fp32 `(Ip/128, rows)`, before the sum over the blocks of features; `d_act` is
    `(rows, Ip)`."""
    products = d_act[:, : act.num_features].float() * swiglu(x, None, act, groups)
    missing = act.padded_features - act.num_features
    return F.pad(products, (0, missing)).unflatten(1, (-1, BLOCK)).sum(2).t().contiguous()


def stored_values(x: RowOperand, groups: TokenGroups) -> Tensor:
    """bf16 `(M, 2Ip)`: gate and up as backward takes them where they are stored quantized `(R, 2Ip)`; zeros for rows of
    no group. Kernels dequantize and round likewise where they read them."""
    values = reference.dequantize_rows(x)[groups.token_row.clamp(min=0)].bfloat16()
    return values.masked_fill((groups.token_row < 0)[:, None], 0.0)


def plain_swiglu(x: Tensor) -> GatedActivation:
    """What most experts compute, of an `x` `(rows, 2I)` that is not padded."""
    return GatedActivation(x.shape[1] // 2, SWIGLU)


def padded(x: Tensor, act: GatedActivation) -> Tensor:
    """`(rows, 2I)` with each half padded with zeros: `(rows, 2Ip)`; without a gate there is one half."""
    halves = x.view(x.shape[0], act.gate.projections, act.num_features)
    return F.pad(halves, (0, act.padded_features - act.num_features)).flatten(1)


def as_in_parameters(x: Tensor, act: GatedActivation) -> Tensor:
    """`(rows, 2I)`, the gate's features before up's, in the order in which parameters hold them."""
    return x.view(-1, 2, act.num_features).transpose(1, 2).reshape(x.shape) if act.interleaved else x


def bias_gradient(d_x: Tensor, groups: TokenGroups) -> Tensor:
    """fp32 `(E, 2I)`: the sum of `d_x` `(rows, 2I)` over the rows of each expert."""
    blocks = reference.gather_padded_rows(d_x, groups).view(-1, BLOCK, d_x.shape[1]).sum(1)
    # Not a product with zeros and ones: that would carry NaN from one expert to all, and autocast would round it.
    ends = F.pad(groups.padded_ends, (1, 0)).long() // BLOCK
    return torch.segment_reduce(blocks, "sum", offsets=ends, axis=0, initial=0, unsafe=True)


def gate_and_up(x: Tensor, act: GatedActivation, groups: TokenGroups | None) -> tuple[Tensor | None, Tensor]:
    """fp32 `(rows, I)` each, with their bias. The bits of the sums are those of fp32 additions."""
    halves = x.view(-1, act.gate.projections, x.shape[1] // act.gate.projections)[:, :, : act.num_features].float()
    if act.bias is not None:
        if groups is None:
            raise ValueError("groups is None; with a bias it must say which expert each row belongs to")
        expert = _expert_of_rows(x.shape[0], groups)
        bias = F.pad(act.bias.float(), (0, 0, 0, 1))  # rows of no group have none
        order = (act.num_features, 2) if act.interleaved else (act.gate.projections, act.num_features)
        of_halves = bias.view(-1, *order)
        halves = halves + (of_halves.transpose(1, 2) if act.interleaved else of_halves)[expert]
    return (halves[:, 0], halves[:, 1]) if act.gate.has_gate else (None, halves[:, 0])


def _expert_of_rows(num_rows: int, groups: TokenGroups) -> Tensor:
    """int64 `(rows,)`: the expert of each row that `groups` reads, `E` for rows of no group."""
    # One slot more takes what padding points at: nothing here waits for the device.
    index = torch.where(groups.row_source < 0, num_rows, groups.row_source).long()
    expert = torch.full((num_rows + 1,), groups.num_groups, dtype=torch.int64, device=index.device)
    return expert.index_copy_(0, index, groups.row_expert.long())[:num_rows]


def quantize_in_groups(x: Tensor, group_size: int, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """fp32 `(rows, I)` to e4m3 `(rows, I)` and scales fp32 `(rows, I / group_size)`: tiles of 1 x `group_size`."""
    num_rows, num_features = x.shape
    tiles = x.reshape(num_rows, num_features // group_size, group_size)
    data, scale = reference.quantize_tiles(tiles, (2,), scale_format)
    return data.view(num_rows, num_features), scale.squeeze(2)
