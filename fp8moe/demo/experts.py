"""The baseline of the demo: experts in BF16."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe import SwiGLUExperts


class BF16Experts(SwiGLUExperts):
    """The baseline: the parameters of `SwiGLUExperts`, and PyTorch's own BF16 operations."""

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """`(T, H)` to `(T, H)`, as `SwiGLUExperts`; every token has its `k` experts."""
        num_tokens, num_choices = topk_ids.shape
        sorted_ids, order = topk_ids.flatten().sort(stable=True)
        experts = torch.arange(self.num_experts, device=sorted_ids.device)
        offs = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)

        places = order.argsort()
        permuted = _Rows.apply(hidden, order, places, num_choices)  # (T * k, H)
        gate, up = _bf16_grouped_mm(permuted, self.w_gate_up, offs).chunk(2, dim=-1)  # (T * k, I) each
        weights = topk_weights.flatten()[order].to(gate.dtype)
        outputs = _bf16_grouped_mm(F.silu(gate) * up * weights[:, None], self.w_down, offs)  # (T * k, H)
        return _Rows.apply(outputs, places, order, 1).view(num_tokens, num_choices, -1).sum(dim=1)


class _Rows(torch.autograd.Function):
    """Each row `copies` times, in the order of a permutation. Autograd's own gradient would add up in any order, on a
    GPU by atomics; this one repeats its bits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None


def _bf16_grouped_mm(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """`a (M, K) @ w[e] (N, K)^T` of each group, in BF16: `(M, N)` in `a`'s dtype or the autocast dtype."""
    device = a.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    operands = a.bfloat16(), w.bfloat16().transpose(-2, -1)
    # On a CPU oneDNN would compile a BF16 kernel for every new group size: fp32 products of the same BF16 operands
    # are faster, and as accurate. torch.compile knows this op in BF16 alone.
    if device == "cpu" and not torch.compiler.is_compiling():
        operands = operands[0].float(), operands[1].float()
    return F.grouped_mm(*operands, offs=offs).bfloat16().to(out_dtype)
