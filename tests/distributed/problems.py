"""Layers for some ranks: what one process computes with all experts, and what each rank does with its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

import fp8moe
from fp8moe import FP8Config, ScaleFormat
from fp8moe.distributed import ep_moe_forward

POW2 = FP8Config(scale_format=ScaleFormat.POW2)
H, I = 256, 128  # noqa: E741

Results = dict[str, Tensor]
"""The output and the gradients, by name."""
OF_TOKENS = ("out", "hidden", "topk_weights")


def differ_in_rank(num_tokens: int, k: int, num_ranks: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """`(T, k)`: experts of `k` different ranks, in any order."""
    ranks = torch.rand(num_tokens, num_ranks, generator=generator).argsort(1)[:, :k]
    return ranks * num_experts + torch.randint(num_experts, ranks.shape, generator=generator)


def differ(num_tokens: int, k: int, num_ranks: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """`(T, k)`: different experts."""
    return torch.rand(num_tokens, num_ranks * num_experts, generator=generator).argsort(1)[:, :k]


def anything(num_tokens: int, k: int, num_ranks: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """`(T, k)`: any experts, one more than once, and ids of none."""
    return torch.randint(-2, num_ranks * num_experts + 2, (num_tokens, k), generator=generator)


@dataclass
class Problem:
    """Tokens of all ranks, one rank after the other, and all experts."""

    sizes: Sequence[int]
    """Tokens of each rank."""
    num_experts: int
    """Of a rank."""
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    dout: Tensor

    @classmethod
    def draw(
        cls, sizes: Sequence[int], num_experts: int, k: int, choose: Callable[..., Tensor] = differ, seed: int = 0,
        dtype: torch.dtype = torch.float32, width: int = 2, hidden_size: int = H, intermediate_size: int = I,
    ) -> "Problem":  # fmt: skip
        """Values that bf16 holds."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*shape, generator=generator)).bfloat16().to(dtype)

        t, experts = sum(sizes), len(sizes) * num_experts
        return cls(
            sizes, num_experts, normal(t, hidden_size), choose(t, k, len(sizes), num_experts, generator),
            torch.rand(t, k, generator=generator),
            normal(experts, width * intermediate_size, hidden_size, std=hidden_size**-0.5),
            normal(experts, hidden_size, intermediate_size, std=intermediate_size**-0.5),
            normal(t, hidden_size),
        )  # fmt: skip

    @classmethod
    def exact(cls, sizes: Sequence[int], num_experts: int, k: int) -> "Problem":
        """With `Gate.relu_squared()` all products are exact, and so the same bits on every CPU: each token, and each
        gradient, has one feature that is not zero. Experts of a token are on different ranks."""
        problem = cls.draw(sizes, num_experts, k, differ_in_rank, width=1)
        generator = torch.Generator().manual_seed(1)
        for name in ("hidden", "dout", "w_gate_up", "w_down"):
            shape = getattr(problem, name).shape
            magnitudes = torch.tensor([1.75, 3.5, 7.0])[torch.randint(3, shape, generator=generator)]
            x = torch.where(torch.rand(shape, generator=generator) < 0.5, -magnitudes, magnitudes)
            if name in ("hidden", "dout"):
                one = torch.randint(shape[1], (shape[0], 1), generator=generator)
                x = torch.zeros_like(x).scatter(1, one, x)
            setattr(problem, name, x)
        problem.weights = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, problem.ids.shape, generator=generator)]
        return problem

    def tokens_of(self, rank: int) -> slice:
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def experts_of(self, rank: int) -> slice:
        return slice(rank * self.num_experts, (rank + 1) * self.num_experts)

    def local(self, rank: int, x: Tensor, name: str) -> Tensor:
        """What a rank has of a tensor of all tokens or of all experts."""
        return x[self.tokens_of(rank) if name in OF_TOKENS else self.experts_of(rank)]


def results(problem: Problem, layer: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> Results:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = layer(*leaves)
    out.backward(dout)
    names = ("hidden", "topk_weights", "w_gate_up", "w_down")
    grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def in_one_process(problem: Problem, rank: int, ids: Tensor | None = None, **options: Any) -> Results:
    """What `moe_forward` makes of all tokens and all experts; of that what this rank should have."""
    chosen = problem.ids if ids is None else ids

    def layer(hidden: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        return fp8moe.moe_forward(hidden, chosen, weights, w_gate_up, w_down, **{"config": POW2, **options})

    inputs = (problem.hidden, problem.weights, problem.w_gate_up, problem.w_down)
    found = results(problem, layer, inputs, problem.dout)
    return {name: problem.local(rank, x, name) for name, x in found.items()}


def in_parallel(problem: Problem, rank: int, group: Any, **options: Any) -> Results:
    """What this rank has of `ep_moe_forward`."""
    tokens, experts = problem.tokens_of(rank), problem.experts_of(rank)

    def layer(hidden: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        options_ = {"config": POW2, **options}
        return ep_moe_forward(hidden, problem.ids[tokens], weights, w_gate_up, w_down, group, **options_)

    inputs = (problem.hidden[tokens], problem.weights[tokens], problem.w_gate_up[experts], problem.w_down[experts])
    return results(problem, layer, inputs, problem.dout[tokens])


def exactly(problem: Problem, rank: int) -> Results:
    """The same in float64, token by token."""

    def layer(hidden: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        rows = []
        for t, chosen in enumerate(problem.ids.tolist()):
            row = torch.zeros_like(hidden[t])
            for j, e in enumerate(chosen):
                if 0 <= e < len(w_down):
                    gate, up = (w_gate_up[e] @ hidden[t]).chunk(2)
                    row = row + weights[t, j] * (w_down[e] @ (silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)

    inputs = [x.double() for x in (problem.hidden, problem.weights, problem.w_gate_up, problem.w_down)]
    found = results(problem, layer, inputs, problem.dout.double())
    return {name: problem.local(rank, x, name) for name, x in found.items()}
