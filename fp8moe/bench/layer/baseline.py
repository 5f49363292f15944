"""The same layer in BF16, in each of PyTorch's ways."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.layer.experts import Experts
from fp8moe.bench.problem import Op
from fp8moe.bench.variants import Variant, bf16_op, bf16_variants
from fp8moe.gate import SWIGLU, GateKind

Function = Callable[..., Any]
"""Of tensors, to one or several."""


def bf16_layers(experts: Experts, device: torch.device) -> list[Variant]:
    """All of them, those that nothing compiles first, each with and without `main_grad`s.

    Only on a GPU is anything compiled. What was compiled for an earlier problem is forgotten, because it counts towards
    a limit.
    """
    ways: list[tuple[str, Op, str]] = [("BF16 eager", eager_layer(experts), "torch grouped_mm")]
    if device.type == "cuda":
        torch.compiler.reset()
        partly = fused_layer(experts, torch.compile(fullgraph=True, dynamic=False))
        ways += [
            ("BF16 compiled SwiGLU", partly, "torch grouped_mm, compiled SwiGLU and sums"),
            ("BF16 compiled", torch.compile(eager_layer(experts), dynamic=False), "torch grouped_mm, all compiled"),
        ]
    return [variant for way in ways for variant in bf16_variants(*way)]


def eager_layer(experts: Experts) -> Op:
    """As users write it: choices sorted by expert, rows selected, a product, SwiGLU, a product, and each token's rows
    put back in their order, weighted and added up."""
    activate = activation_of(experts)

    def op(
        hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *biases: Tensor
    ) -> Tensor:
        expert, order = topk_ids.flatten().sort(stable=True)
        offs = group_ends(expert, w_down.shape[0])
        x = bf16_op(hidden.index_select(0, order // topk_ids.shape[1]), w_gate_up, offs)
        x = x + biases[0][expert] if biases else x
        x = bf16_op(activate(x), w_down, offs)
        x = x + biases[1][expert] if biases else x
        chosen = x.index_select(0, inverse_of(order)).view(*topk_ids.shape, -1)  # (T, k, H)
        return (chosen * topk_weights.to(chosen.dtype)[:, :, None]).sum(1)

    return op


def fused_layer(experts: Experts, compile_: Callable[[Function], Function] = lambda function: function) -> Op:
    """With more care: the router's weights are folded into SwiGLU, the gradients of copying and adding up rows are each
    other, without atomics, and biases are products, so that their gradients are summed in fp32. `compile_` compiles
    what is no matrix product."""
    function = activation_of(experts)

    def weighted(gate_up: Tensor, row_weights: Tensor) -> Tensor:
        return function(gate_up) * row_weights.to(gate_up.dtype)[:, None]

    def weighted_backward(d_activation: Tensor, gate_up: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = torch.func.vjp(weighted, gate_up, row_weights)[1](d_activation)
        return gradients

    activate, activate_backward, add_up = compile_(weighted), compile_(weighted_backward), compile_(sum_rows)

    def op(
        hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *biases: Tensor
    ) -> Tensor:
        expert, order = topk_ids.flatten().sort(stable=True)
        num_experts = w_down.shape[0]
        offs = group_ends(expert, num_experts)
        row_token, choice_row = order // topk_ids.shape[1], inverse_of(order).view(topk_ids.shape)
        rows = MoveRows.apply(hidden, row_token, choice_row, copy_rows, add_up)
        row_weights = topk_weights.flatten().index_select(0, order)
        x = bf16_op(rows, w_gate_up, offs)
        if biases:
            own = F.one_hot(expert, num_experts).to(x.dtype)  # (M, E)
            x = torch.addmm(x, own, biases[0])
        x = bf16_op(WithGradient.apply(activate, activate_backward, x, row_weights), w_down, offs)
        if biases:
            x = torch.addmm(x, own * row_weights.to(x.dtype)[:, None], biases[1])
        out: Tensor = MoveRows.apply(x, choice_row, row_token, add_up, copy_rows)
        return out

    return op


def activation_of(experts: Experts) -> Function:
    """`(M, 2I)` to `(M, I)`, operation by operation in the dtype of the input.

    Raises:
        ValueError: there is none for this gate.
    """
    if experts.gate == SWIGLU and not experts.interleaved:
        return swiglu
    if experts.gate.kind is not GateKind.CLAMPED_SWIGLU or not experts.interleaved:
        raise ValueError(f"experts is {experts}; it must have plain SwiGLU, or clamped SwiGLU of interleaved features")
    limit, alpha, up_offset = experts.gate.parameters

    def clamped_swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up[:, 0::2].clamp(max=limit), gate_up[:, 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(gate * alpha) * (up + up_offset)

    return clamped_swiglu


def swiglu(gate_up: Tensor) -> Tensor:
    """`(M, 2I)` to `(M, I)`, the gate's half first."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def copy_rows(tokens: Tensor, row_token: Tensor) -> Tensor:
    """`(T, H)` to `(M, H)`."""
    return tokens[row_token]


def sum_rows(rows: Tensor, choice_row: Tensor) -> Tensor:
    """`(M, H)` to `(T, H)`: the rows of each token's choices `(T, k)`, added up."""
    return rows[choice_row].sum(1)


def group_ends(expert: Tensor, num_experts: int) -> Tensor:
    """int32 `(E,)`, where the rows of each expert end: `expert` `(M,)` is sorted."""
    experts = torch.arange(num_experts, device=expert.device)
    return torch.searchsorted(expert, experts, right=True, out_int32=True)


def inverse_of(order: Tensor) -> Tensor:
    """Where each of what was put into this order has gone."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class WithGradient(torch.autograd.Function):
    """`function` of the tensors, with a `gradient` that may be compiled as well: a function of the gradient of the
    result, and of the tensors."""

    @staticmethod
    def forward(ctx: Any, function: Function, gradient: Function, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient = gradient
        result: Tensor = function(*tensors)
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradient(d_result, *ctx.saved_tensors)


class MoveRows(torch.autograd.Function):
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
