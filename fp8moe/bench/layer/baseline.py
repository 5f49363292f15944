"""The same layer in BF16, as well as PyTorch can do it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.variants import BF16, Variant, bf16_op

Function = Callable[..., Any]
"""Of tensors, to one or several."""


def bf16_layer(device: torch.device) -> Variant:
    """The baseline: rows sorted by expert, two `grouped_mm`, in between SwiGLU with the router's weights folded in.

    On a GPU what is not a matrix product is compiled; what was compiled for an earlier problem is forgotten, because it
    counts towards a limit.
    """
    if device.type != "cuda":
        return _variant(lambda function: function, BF16.computed_by(torch.empty(0)))
    torch.compiler.reset()
    compile_ = torch.compile(fullgraph=True, dynamic=False)
    return _variant(compile_, "torch grouped_mm, compiled SwiGLU and sums")


def _variant(compile_: Callable[[Function], Function], computed_by: str) -> Variant:
    activate, activate_backward, add_up = compile_(swiglu), compile_(swiglu_backward), compile_(sum_rows)

    def op(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        sorted_ids, order = topk_ids.flatten().sort(stable=True)
        choice_row = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        experts = torch.arange(w_down.shape[0], device=order.device)
        offs = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
        row_token, choice_row = order // topk_ids.shape[1], choice_row.view(topk_ids.shape)
        rows = _MoveRows.apply(hidden, row_token, choice_row, copy_rows, add_up)
        row_weights = topk_weights.flatten().index_select(0, order)
        activation = _Activate.apply(bf16_op(rows, w_gate_up, offs), row_weights, activate, activate_backward)
        out: Tensor = _MoveRows.apply(bf16_op(activation, w_down, offs), choice_row, row_token, add_up, copy_rows)
        return out

    return Variant(BF16.name, op, lambda out: computed_by, is_ours=False)


def swiglu(gate_up: Tensor, row_weights: Tensor) -> Tensor:
    """`(M, 2I)` and `(M,)` to `(M, I)`, the gate's half first, each row times its weight."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up * row_weights.to(gate_up.dtype)[:, None]


def swiglu_backward(d_activation: Tensor, gate_up: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `gate_up` and `row_weights`."""
    gradients: tuple[Tensor, ...] = torch.func.vjp(swiglu, gate_up, row_weights)[1](d_activation)
    return gradients


def copy_rows(tokens: Tensor, row_token: Tensor) -> Tensor:
    """`(T, H)` to `(M, H)`."""
    return tokens[row_token]


def sum_rows(rows: Tensor, choice_row: Tensor) -> Tensor:
    """`(M, H)` to `(T, H)`: the rows of each token's choices `(T, k)`, added up."""
    return rows[choice_row].sum(1)


class _Activate(torch.autograd.Function):
    """SwiGLU. A gradient that PyTorch compiles can be computed once for each forward: too few to be timed."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, row_weights: Tensor, activate: Function, activate_backward: Function
    ) -> Tensor:
        ctx.save_for_backward(gate_up, row_weights)
        ctx.activate_backward = activate_backward
        activation: Tensor = activate(gate_up, row_weights)
        return activation

    @staticmethod
    def backward(ctx: Any, d_activation: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.activate_backward(d_activation, *ctx.saved_tensors), None, None


class _MoveRows(torch.autograd.Function):
    """`move` by an index, whose gradient is `back` by another: copying rows and adding them up are each other's.

    Autograd's own gradient of an index would add in an order of its own, slowly.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back_index: Tensor, move: Function, back: Function) -> Tensor:
        ctx.save_for_backward(back_index)
        ctx.back = back
        moved: Tensor = move(rows, index)
        return moved

    @staticmethod
    def backward(ctx: Any, d_moved: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(d_moved, *ctx.saved_tensors), None, None, None, None
