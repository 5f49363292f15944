"""The expert MLP in BF16, which AUTO runs where FP8 does not pay: PyTorch's operations, and the same promises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.autograd.dtypes import output_dtype
from fp8moe.autograd.grouped_mm import grouped_mm_in_bf16
from fp8moe.autograd.mlp_weights import MlpWeights, expert_weights_of_rows
from fp8moe.gate import SWIGLU, GatedActivation
from fp8moe.quantize.gated import activation
from fp8moe.rows.routing import Routing


def experts_in_bf16(
    a: Tensor, mlp: MlpWeights, ends: Tensor, row_weights: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`(M, H)` from `a` `(M, H)`. As in FP8, gate and up are BF16 whatever the dtype of `a`: fp16 would overflow where
    an activation is larger than 65504."""
    main_gate_up, main_down = (None if grad is None else grad.transpose(1, 2) for grad in mlp.main_grads)
    both: Tensor | tuple[Tensor, ...]
    if isinstance(mlp.w_gate_up, Tensor):
        both = grouped_mm_in_bf16(a, mlp.w_gate_up.transpose(1, 2), ends, main_gate_up, torch.bfloat16)  # (M, 2I)
    else:
        both = tuple(grouped_mm_in_bf16(a, w.transpose(1, 2), ends, None, torch.bfloat16) for w in mlp.w_gate_up)
    if mlp.act.bias is not None:
        bias = expert_weights_of_rows(ends, a.shape[0], None).to(mlp.act.bias.dtype) @ mlp.act.bias  # (M, 2I)
        both = (both if isinstance(both, Tensor) else torch.cat(both, dim=1)) + bias
    values = _activation(both, mlp.act)  # (M, I)
    if row_weights is not None:
        values = values * row_weights[:, None]  # in the wider dtype: a router's weights are not rounded
    return grouped_mm_in_bf16(values, mlp.w_down.transpose(1, 2), ends, main_down, out_dtype)


def _activation(both: Tensor | tuple[Tensor, ...], act: GatedActivation) -> Tensor:
    """Of gate and up `(M, 2I)`, or `(M, I)` each."""
    gate: Tensor | None
    if isinstance(both, tuple):
        gate, up = both
    elif not act.gate.has_gate:
        gate, up = None, both
    elif act.interleaved:
        gate, up = both[:, 0::2], both[:, 1::2]
    else:
        gate, up = both.chunk(2, dim=1)
    if act.gate == SWIGLU and gate is not None:
        return F.silu(gate) * up  # PyTorch's own: fewer passes
    return activation(act.gate, None if gate is None else gate.float(), up.float()).to(up.dtype)


def routed_experts_in_bf16(hidden: Tensor, routing: Routing, topk_weights: Tensor, mlp: MlpWeights) -> Tensor:
    """`(T, H)` to `(T, H)`."""
    # A row of no choice copies the first token: its output is zeros, and so is its gradient.
    padded_row = routing.groups.token_row.clamp(min=0)
    row = routing.choice_row.flatten()
    skipped = torch.full_like(row, row.numel())  # past the last
    weights = topk_weights.new_zeros(row.numel() + 1).scatter(
        0, torch.where(row < 0, skipped, row).long(), topk_weights.flatten()
    )[:-1]
    rows = hidden[routing.row_token[padded_row].clamp(min=0)]  # (M, H)
    out = experts_in_bf16(rows, mlp, routing.groups.ends, weights, torch.bfloat16)
    chosen = out[routing.choice_row.clamp(min=0)]  # (T, k, H)
    return chosen.masked_fill((routing.choice_row < 0)[:, :, None], 0.0).sum(1).to(output_dtype(hidden))
