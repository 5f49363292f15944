"""What two ranks with a GPU each assert, with NCCL: functions whose names begin with `case_`, in this order."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fp8moe
from fp8moe import FP8Config, KernelPreference, ScaleFormat, SwiGLUExperts
from fp8moe.distributed import Dispatch, ExpertParallelExperts, ep_moe_forward, exclude_from_ddp
from tests.gpu.ranks import Rank
from tests.gpu.support import no_synchronization, poison_free_memory
from tests.measures import assert_same_bits, sqnr

POW2 = FP8Config(kernel_preference=KernelPreference.TRITON, scale_format=ScaleFormat.POW2)


@dataclass(frozen=True)
class Problem:
    """Tokens of all ranks, as many of each, and all experts; the same on every rank."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    dout: Tensor

    @classmethod
    def draw(
        cls, rank: Rank, t: int, k: int, h: int, i: int, e: int, *, apart: bool = False, seed: int = 0
    ) -> "Problem":
        """`t` tokens of each rank; with `apart` no two experts of a token share a rank."""
        generator = torch.Generator(rank.device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=rank.device) * scale).bfloat16()

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=rank.device)

        if apart:
            ranks, local = uniform(rank.count * t, rank.count).argsort(1)[:, :k], e // rank.count
            ids = ranks * local + (uniform(*ranks.shape) * local).long()
        else:
            ids = uniform(rank.count * t, e).argsort(1)[:, :k].contiguous()
        return cls(
            normal(rank.count * t, h), ids, uniform(rank.count * t, k), normal(e, 2 * i, h, scale=h**-0.5),
            normal(e, h, i, scale=i**-0.5), normal(rank.count * t, h),
        )  # fmt: skip

    def slices(self, rank: Rank) -> tuple[slice, slice]:
        """The tokens and the experts of a rank."""
        return tuple(
            slice(rank.number * len(x) // rank.count, (rank.number + 1) * len(x) // rank.count)
            for x in (self.hidden, self.w_down)
        )  # type: ignore[return-value]

    def run(self, layer: Callable[..., Tensor], tokens: slice, experts: slice) -> list[Tensor]:
        """The output, and the gradients of `hidden`, the router's weights, `w_gate_up` and `w_down`."""
        inputs = (self.hidden[tokens], self.weights[tokens], self.w_gate_up[experts], self.w_down[experts])
        hidden, weights, w_gate_up, w_down = leaves = [x.clone().requires_grad_() for x in inputs]
        out = layer(hidden, self.ids[tokens], weights, w_gate_up, w_down)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout[tokens])]

    def in_one_process(self, rank: Rank) -> list[Tensor]:
        """All tokens and all experts; of that what this rank should have."""
        tokens, experts = self.slices(rank)
        found = self.run(lambda *args: fp8moe.moe_forward(*args, config=POW2), slice(None), slice(None))
        return [x[tokens] for x in found[:3]] + [x[experts] for x in found[3:]]

    def in_parallel(self, rank: Rank, **options: Any) -> list[Tensor]:
        return self.run(lambda *args: ep_moe_forward(*args, None, config=POW2, **options), *self.slices(rank))


def close(actual: list[Tensor], expected: list[Tensor], decibels: float) -> None:
    for number, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert mine.isfinite().all(), number
        found = sqnr(mine, theirs)
        assert found >= decibels, (number, found)


def case_expert_parallelism_is_one_process(rank: Rank) -> None:
    for t, k, h, i, e, apart in (
        (700, 2, 1024, 512, 8, True), (333, 8, 2048, 768, 32, False), (130, 2, 2880, 200, 8, True)
    ):  # fmt: skip
        problem = Problem.draw(rank, t, k, h, i, e, apart=apart)
        expected = problem.in_one_process(rank)
        for dispatch in Dispatch:
            for room in ({}, {"capacity": t}, {"capacity": t, "max_rows": 2 * t * k}):
                dropped = {"dropped": torch.zeros((), dtype=torch.int64, device=rank.device)} if room else {}
                poison_free_memory()
                close(problem.in_parallel(rank, dispatch=dispatch, **room, **dropped), expected, 40)
                assert not any(map(int, dropped.values()))


def case_all_tokens_on_one_rank_and_ranks_without_tokens(rank: Rank) -> None:
    problem = Problem.draw(rank, 200, 2, 512, 256, 8)
    skewed = Problem(**{**vars(problem), "ids": problem.ids % (8 // rank.count)})
    close(skewed.in_parallel(rank)[:3], skewed.in_one_process(rank)[:3], 40)
    tokens, experts = slice(0, 0 if rank.number else 400), problem.slices(rank)[1]
    found = problem.run(lambda *args: ep_moe_forward(*args, None, config=POW2), tokens, experts)
    whole = problem.run(lambda *args: fp8moe.moe_forward(*args, config=POW2), slice(None), slice(None))
    expected = [x[tokens] for x in whole[:3]] + [x[experts] for x in whole[3:]]
    close(found[3:] if rank.number else found, expected[3:] if rank.number else expected, 40)


def case_with_a_capacity_no_rank_waits_and_a_graph_takes_any_routing(rank: Rank) -> None:
    t, k, e = 512, 4, 8
    problem = Problem.draw(rank, t, k, 1024, 512, e)
    tokens, experts = problem.slices(rank)
    hidden, weights = (x[tokens].clone().requires_grad_() for x in (problem.hidden, problem.weights))
    w_gate_up, w_down = (x[experts].clone().requires_grad_() for x in (problem.w_gate_up, problem.w_down))
    ids, dout = problem.ids[tokens].clone(), problem.dout[tokens].clone()
    dropped = torch.zeros((), dtype=torch.int64, device=rank.device)
    for dispatch in Dispatch:

        def step(dispatch: Dispatch = dispatch) -> list[Tensor]:
            out = ep_moe_forward(
                hidden, ids, weights, w_gate_up, w_down, None, dispatch=dispatch, capacity=t - 20, max_rows=3 * t * k,
                dropped=dropped, config=POW2,
            )  # fmt: skip
            return [out, *torch.autograd.grad(out, (hidden, weights, w_gate_up, w_down), dout)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()  # compiles kernels, opens connections
            with no_synchronization():
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step()
        with torch.no_grad():
            ids.copy_(torch.rand(t, e, device=rank.device).argsort(1)[:, :k])
            hidden.copy_(torch.randn_like(hidden))
        poison_free_memory()
        dropped.zero_()
        graph.replay()
        of_graph = [x.clone() for x in (*made, dropped)]
        dropped.zero_()
        for mine, theirs in zip(of_graph, (*step(), dropped), strict=True):
            assert_same_bits(mine, theirs)
            assert theirs.any()
        assert dropped > 0


class Model(nn.Module):
    """A router and its experts."""

    def __init__(self, experts: Any, hidden_size: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device)
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        weights, ids = self.router(hidden).softmax(-1).topk(2)
        out: Tensor = self.experts(hidden, ids, weights)
        return out


def build(rank: Rank, experts: Callable[[], Any] | None = None, **options: Any) -> Model:
    torch.manual_seed(0)
    whole = SwiGLUExperts(8, 512, 256, config=POW2, device=rank.device, **options)
    model = Model(whole, 512, 8, rank.device)
    if experts is not None:
        model.experts = experts()
        mine = slice(8 * rank.number // rank.count, 8 * (rank.number + 1) // rank.count)
        model.experts.load_state_dict({name: x[mine] for name, x in whole.state_dict().items()})
    return model


def batch(rank: Rank, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(300 + 40 * number, 512, generator=generator).to(rank.device)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def averaged(rank: Rank) -> list[Tensor]:
    """What DDP should make of the batches of all ranks."""
    model = build(rank)
    for number in range(rank.count):
        (model(batch(rank, number)).square().mean() / rank.count).backward()
    return gradients(model)


def case_ddp_averages_gradients(rank: Rank) -> None:
    expected = averaged(rank)
    ways: list[dict[str, Any]] = [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}]
    for options in ways:
        for cached in (False, True):
            ddp = DistributedDataParallel(build(rank, cache_weights=cached), device_ids=[rank.device], **options)
            for _ in range(2):
                ddp.zero_grad()
                ddp(batch(rank, rank.number)).square().mean().backward()
            close(gradients(ddp), expected, 40)


def case_ddp_leaves_the_experts_to_their_ranks(rank: Rank) -> None:
    expected = averaged(rank)
    mine = slice(8 * rank.number // rank.count, 8 * (rank.number + 1) // rank.count)
    group = dist.new_group()  # of its own: DDP's reductions and the all-to-alls need no common order
    for dispatch in Dispatch:

        def experts(dispatch: Dispatch = dispatch) -> ExpertParallelExperts:
            return ExpertParallelExperts(8, 512, 256, group, config=POW2, device=rank.device, dispatch=dispatch)

        model = build(rank, experts)
        exclude_from_ddp(model)
        ddp = DistributedDataParallel(model, device_ids=[rank.device])
        ddp(batch(rank, rank.number)).square().mean().backward()
        actual = gradients(ddp)
        close(actual[:1], expected[:1], 25)  # of the router: it sees differences of rounded rows
        close(actual[1:], [x[mine] for x in expected[1:]], 22)  # tokens of all ranks share scales


def case_transformers(rank: Rank) -> None:
    """Each rank with a batch of its own; losses of three steps against one process with both."""
    import fp8moe.integrations.transformers as hf
    from tests.integrations import transformers_ranks as ranks

    os.environ |= {"RANK": str(rank.number), "LOCAL_RANK": str(rank.number), "WORLD_SIZE": str(rank.count)}
    hf.register(strict=True, config=FP8Config(kernel_preference=KernelPreference.TRITON))
    model = rank.folder / "model"
    expected = ranks.steps(ranks.load(model, None).to(rank.device), range(rank.count))
    for options in ({"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "fp8moe"}):
        actual = ranks.steps(ranks.load(model, options), [rank.number])
        for mine, theirs in zip(actual, expected, strict=True):
            assert abs(mine[0] / theirs[rank.number] - 1) < 5e-3, (options, actual, expected)
    assert expected[-1][0] < 0.95 * expected[0][0]


CASES: dict[str, Callable[[Rank], None]] = {
    name: function for name, function in list(globals().items()) if name.startswith("case_")
}
