"""The shapes of a run, and what each rank gets of one: tokens and experts of its own, chosen by one router.

Shapes: `P` ranks, `T` tokens a rank, `k` choices a token, `E` experts of all ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.bench.distributed.ranks import Ranks
from fp8moe.bench.layer.task import COMPARED_FROM
from fp8moe.bench.problem import Problem, random_normal
from fp8moe.bench.shapes import Balance, Shape, draw_topk, layer_shape

SEED = 0
MANY_RANKS = 8
"""From as many ranks on, all experts of DeepSeek-V3 fit."""
BALANCES = (Balance.UNIFORM, Balance.SKEWED, Balance.FEW)
"""The default first."""
ON_CUDA = (
    layer_shape(4096, 8, 7168, 2048, 32, "like DeepSeek-V3, 32 experts"),
    layer_shape(4096, 8, 7168, 2048, 64, "like DeepSeek-V3, 64 experts"),
    layer_shape(8192, 8, 2048, 768, 128, "Qwen3-30B-A3B"),
)
WITH_MANY_RANKS = (layer_shape(4096, 8, 7168, 2048, 256, "DeepSeek-V3, 256 experts"),)
ON_CPU = (layer_shape(64, 2, 128, 128, 4, "tiny"), layer_shape(48, 4, 256, 128, 8, "tiny fine-grained"))
KNOWN = (*ON_CUDA, *WITH_MANY_RANKS, *ON_CPU)


def default_shapes(on_cuda: bool, num_ranks: int) -> list[Shape]:
    """What is measured unless somebody asks for something else."""
    if not on_cuda:
        return list(ON_CPU)
    return [*ON_CUDA, *(WITH_MANY_RANKS if num_ranks >= MANY_RANKS else ())]


def check_shape(shape: Shape, num_ranks: int) -> None:
    """That each rank gets the same number of experts.

    Raises:
        ValueError: it does not.
    """
    if shape["E"] % num_ranks:
        raise ValueError(
            f"E of shape {shape} is {shape['E']}; it must be a multiple of the number of ranks, {num_ranks}"
        )


@dataclass(frozen=True, eq=False)
class RankProblem:
    """What one rank has, and what it must know of all."""

    problem: Problem
    """Its tensors; arguments as of `moe_forward`, ids of all ranks' experts, weights of its own experts."""
    ids: Tensor
    """int64 `(P, T, k)`, on the CPU: the choices on all ranks."""
    num_experts: int
    """Of a rank."""

    @property
    def choice_rank(self) -> Tensor:
        """`(P, T, k)`: the rank of each choice's expert."""
        return self.ids // self.num_experts

    def rows_sent(self, *, once: bool) -> Tensor:
        """`(P, P)`: how many rows each rank sends to each, itself included: one for each choice, or, if `once`, one for
        each token that chose any expert there."""
        count = len(self.ids)
        to = self.choice_rank[..., None] == torch.arange(count)  # (P, T, k, P)
        return to.any(2).sum(1) if once else to.sum((1, 2))

    def group_sizes(self, rank: int) -> list[int]:
        """How many rows each expert of a rank gets."""
        counts = torch.bincount(self.ids.flatten(), minlength=len(self.ids) * self.num_experts)
        found: list[int] = counts.view(-1, self.num_experts)[rank].tolist()
        return found


def draw_rank_problem(shape: Shape, balance: Balance, ranks: Ranks) -> RankProblem:
    """As `bench --layer` draws it: the tokens of all ranks by one router, values by a seed of each rank."""
    t, k, h, i, e = shape.sizes
    count, rank, device = ranks.count, ranks.rank, ranks.device
    ids, weights = (x.view(count, t, k) for x in draw_topk(layer_shape(t * count, k, h, i, e), balance, SEED))
    normal = random_normal(device, SEED + 1 + rank)
    local = e // count
    arguments = {
        "hidden": normal(t, h).requires_grad_(),
        "topk_ids": ids[rank].to(device),
        "topk_weights": weights[rank].to(device).requires_grad_(),
        "w_gate_up": normal(local, 2 * i, h).mul_(h**-0.5).requires_grad_(),
        "w_down": normal(local, h, i).mul_(i**-0.5).requires_grad_(),
    }
    found = RankProblem(Problem(arguments, normal(t, h), [], COMPARED_FROM), ids, local)
    found.problem.group_sizes.extend(found.group_sizes(rank))
    return found


def draw_arrived_rows(shape: Shape, drawn: RankProblem, ranks: Ranks) -> Problem:
    """The rows that arrive on this rank, grouped by expert, as arguments of `swiglu_experts`; and the same weights."""
    sizes, h = drawn.problem.group_sizes, shape["H"]
    normal = random_normal(ranks.device, SEED + 1 + ranks.count + ranks.rank)
    weights = {name: drawn.problem.arguments[name] for name in ("w_gate_up", "w_down")}
    rows = sum(sizes)
    offs = torch.tensor(sizes, device=ranks.device).cumsum(0).int()
    arguments = {"rows": normal(rows, h).requires_grad_(), **weights, "offs": offs}
    return Problem(arguments, normal(rows, h), sizes)
