"""Expert parallelism in BF16 as PyTorch has it, written with care: the baseline.

Every choice travels, in BF16, sorted by expert; what arrives is sorted by expert once more; two grouped products with
a compiled SwiGLU between them; and the same way back, where the router's weights are applied. The gradients of copying
rows and of adding them up are each other: PyTorch's own would add with atomics.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.layer.baseline import (
    Function,
    MoveRows,
    WithGradient,
    copy_rows,
    group_ends,
    inverse_of,
    sum_rows,
    swiglu,
)
from fp8moe.bench.problem import Op
from fp8moe.bench.variants import bf16_op
from fp8moe.distributed import Exchange


def as_it_is(function: Function) -> Function:
    """Instead of a compiler."""
    return function


def plain_layer(exchange: Exchange, compile_: Callable[[Function], Function] = as_it_is) -> Op:
    """Of `(hidden, topk_ids, topk_weights, w_gate_up, w_down)`, as `ep_moe_forward`. `compile_` compiles what is
    neither a matrix product nor an exchange."""
    copy, add_up, experts = compile_(copy_rows), compile_(sum_rows), plain_experts(compile_)
    weigh, weigh_backward = compile_(weighted_sums), compile_(weighted_sums_backward)
    num_ranks = exchange.num_ranks

    def op(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        (_, k), local = topk_ids.shape, w_down.shape[0]
        sorted_ids, order = topk_ids.flatten().sort(stable=True)
        token, choice_row = order // k, inverse_of(order).view(topk_ids.shape)
        ends = group_ends(sorted_ids, local * num_ranks).long()  # torch.bincount would make the host wait
        counts = (ends - F.pad(ends, (1, -1))).view(num_ranks, local)
        each = [1] * num_ranks
        theirs = exchange.send(counts, each, each).wait()
        rows = MoveRows.apply(hidden, token, choice_row, copy, add_up)
        sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()  # the host waits here

        rows = _AllToAll.apply(rows, exchange, sent, received)
        expert = torch.arange(local, device=order.device).repeat(num_ranks)
        by_expert = expert.repeat_interleave(theirs.flatten(), output_size=sum(received)).argsort(stable=True)
        as_arrived = inverse_of(by_expert)
        rows = MoveRows.apply(rows, by_expert, as_arrived, copy, copy)
        out = experts(rows, w_gate_up, w_down, theirs.sum(0).cumsum(0).int())
        out = MoveRows.apply(out, as_arrived, by_expert, copy, copy)
        out = _AllToAll.apply(out, exchange, received, sent)
        result: Tensor = WithGradient.apply(weigh, weigh_backward, out, topk_weights, choice_row, token, order)
        return result

    return op


def plain_experts(compile_: Callable[[Function], Function] = as_it_is) -> Op:
    """Of rows grouped by expert `(M, H)`, `w_gate_up`, `w_down` and `offs`."""
    activate, activate_backward = compile_(swiglu), compile_(_swiglu_backward)

    def op(rows: Tensor, w_gate_up: Tensor, w_down: Tensor, offs: Tensor) -> Tensor:
        if not len(rows):  # a rank that gets nothing: weights get gradients of zeros
            return rows + 0 * (w_gate_up.sum() + w_down.sum())
        return bf16_op(WithGradient.apply(activate, activate_backward, bf16_op(rows, w_gate_up, offs)), w_down, offs)

    return op


def weighted_sums(rows: Tensor, weights: Tensor, choice_row: Tensor, token: Tensor, order: Tensor) -> Tensor:
    """`(T, H)`: the rows `(M, H)` of each token's choices `(T, k)`, weighted and added up in fp32.

    `order` `(M,)` is the choice of each row, and `token` its token, which the gradient needs.
    """
    return (rows[choice_row].float() * weights[:, :, None]).sum(1).to(rows.dtype)


def weighted_sums_backward(
    d_out: Tensor, rows: Tensor, weights: Tensor, choice_row: Tensor, token: Tensor, order: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `weighted_sums`."""
    d_rows = (d_out[token].float() * weights.flatten()[order][:, None]).to(rows.dtype)
    d_weights = (rows[choice_row].float() * d_out.float()[:, None]).sum(2)
    return d_rows, d_weights.to(weights.dtype), None, None, None


def _swiglu_backward(d_activation: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
    """Spelled out, so that a compiler makes one kernel of it."""
    gate, up = gate_up.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    d_gate = d_activation * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (torch.cat([d_gate, d_activation * gate * sigmoid], dim=1),)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, sent: list[int], received: list[int]) -> Tensor:
        ctx.exchange, ctx.sizes = exchange, (received, sent)
        return exchange.send(rows.contiguous(), sent, received).wait()

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.send(d_rows.contiguous(), *ctx.sizes).wait(), None, None, None
