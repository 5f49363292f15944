"""What each rank asserts of `DistributedDataParallel`: cases as those of `cases.py`."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fp8moe
from fp8moe import SwiGLUExperts
from fp8moe.distributed import Dispatch, ExpertParallelExperts, exclude_from_ddp
from tests.distributed.cases import Rank, close, expect, same_bits
from tests.distributed.problems import POW2, H, I

E, K = 4, 2

Gradients = dict[str, Tensor]


class Layer(nn.Module):
    """A router and experts, which any module or function computes; and a layer that may be left out."""

    def __init__(self, experts: Any, num_experts: int = E) -> None:
        super().__init__()
        self.router = nn.Linear(H, num_experts, bias=False)
        self.experts = experts
        self.skipped = nn.Linear(H, H)

    def forward(self, hidden: Tensor, skip: bool = False) -> Tensor:
        weights, ids = self.router(hidden).softmax(-1).topk(K)
        out = self.experts(hidden, ids, weights)
        return out if skip else out + self.skipped(hidden)


class OwnExperts(nn.Module):
    """`moe_forward` in a module of one's own, whose gate and up are views of one parameter."""

    def __init__(self, main_grads: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, 2 * I, H) / H**0.5)
        self.w_down = nn.Parameter(torch.randn(E, H, I) / I**0.5)
        self.main_grads = (None, torch.zeros(E, H, I)) if main_grads else (None, None)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        pair = self.w[:, :I], self.w[:, I:]
        return fp8moe.moe_forward(hidden, ids, weights, pair, self.w_down, config=POW2, main_grads=self.main_grads)


def swiglu(**options: Any) -> SwiGLUExperts:
    return SwiGLUExperts(E, H, I, config=POW2, **options)


def build(experts: Callable[[], Any], seed: int = 0, num_experts: int = E) -> Layer:
    torch.manual_seed(seed)
    return Layer(experts(), num_experts)


def batch(rank: int, step: int = 0) -> Tensor:
    """`(T, H)`: ranks have different numbers of tokens."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(30 + 7 * (rank % 2), H, generator=generator)


def loss_of(model: Any, rank: int, step: int = 0, **options: Any) -> Tensor:
    return model(batch(rank, step), **options).square().mean()


def gradients(module: nn.Module) -> Gradients:
    names = {name.replace("module.", ""): p for name, p in module.named_parameters()}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in names.items()}


def averaged(model: nn.Module, count: int, steps: int = 1, **options: Any) -> Gradients:
    """What DDP should make: the mean over the ranks of what each would add up in `steps`."""
    model.zero_grad()
    for rank in range(count):
        for step in range(steps):
            (loss_of(model, rank, step, **options) / count).backward()
    return gradients(model)


@contextmanager
def quietly() -> Iterator[None]:
    """PyTorch warns of options that find nothing to do, and of strides."""
    with warnings.catch_warnings(action="ignore"):
        yield


def case_ddp_averages_gradients(rank: Rank) -> None:
    for experts in (swiglu, OwnExperts):
        expected = averaged(build(experts), rank.count)
        for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.1}):
            ddp = DistributedDataParallel(build(experts, seed=rank.number), **options)  # all get those of the first
            with quietly():
                for _ in range(2):
                    ddp.zero_grad()
                    loss_of(ddp, rank.number).backward()
            close(gradients(ddp), expected, 55)


def case_ddp_with_layers_that_some_ranks_leave_out(rank: Rank) -> None:
    for experts in (swiglu, OwnExperts):
        ddp = DistributedDataParallel(build(experts), find_unused_parameters=True)
        with quietly():
            loss_of(ddp, rank.number, skip=rank.number > 0).backward()
        model = build(experts)
        for number in range(rank.count):
            (loss_of(model, number, skip=number > 0) / rank.count).backward()
        close(gradients(ddp), gradients(model), 55)


def case_ddp_accumulates_gradients_without_sync(rank: Rank) -> None:
    expected = averaged(build(swiglu), rank.count, steps=3)
    for cached in (False, True):
        ddp = DistributedDataParallel(build(partial(swiglu, cache_weights=cached)))
        for step in range(3):
            with ddp.no_sync() if step < 2 else nullcontext():
                loss_of(ddp, rank.number, step).backward()
        close(gradients(ddp), expected, 55)


def case_the_cache_sees_what_ddp_writes(rank: Rank) -> None:
    """DDP gives all ranks the parameters of the first when it wraps them."""
    model, first = build(lambda: swiglu(cache_weights=True), seed=rank.number), build(swiglu)
    with torch.no_grad():
        before = model(batch(0))  # fills the cache
    ddp = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (ddp, first)]
    for step in range(3):
        out, expected = ddp(batch(0)), first(batch(0))
        close({"out": out.detach()}, {"out": expected.detach()}, 55)
        expect(not torch.equal(out, before) or (rank.number == 0 and step == 0))
        expected = averaged(first, rank.count, step + 1)
        ddp.zero_grad()
        for microbatch in range(step + 1):
            with ddp.no_sync() if microbatch < step else nullcontext():
                loss_of(ddp, rank.number, microbatch).backward()
        close(gradients(ddp), expected, 50)
        for optimizer in optimizers:
            optimizer.step()


def case_ddp_refuses_main_grads_or_leaves_them_to_the_caller(rank: Rank) -> None:
    expected = averaged(build(OwnExperts), rank.count)

    def own() -> OwnExperts:
        return OwnExperts(main_grads=True)

    def reduced(module: Any) -> Gradients:
        """The caller's part: the mean of `main_grad`."""
        main_grad = module.experts.main_grads[1]
        dist.all_reduce(main_grad)
        return gradients(module) | {"experts.w_down": main_grad / rank.count}

    refused = pytest.raises(ValueError, match=r"main_grads\[1\] is given within DistributedDataParallel, which reduces")
    for wrap in (DistributedDataParallel, replicate):
        with refused:
            loss_of(wrap(build(own)), rank.number)

    ddp = DistributedDataParallel(build(own))
    with ddp.no_sync():
        loss_of(ddp, rank.number).backward()
    for p in ddp.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= rank.count
    close(reduced(ddp.module), expected, 55)

    model = build(own)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["experts.w_down"])
    ddp = DistributedDataParallel(model)
    loss_of(ddp, rank.number).backward()
    close(reduced(ddp.module), expected, 55)


def parallel_experts(group: Any, whole: SwiGLUExperts, rank: int, count: int, **options: Any) -> ExpertParallelExperts:
    """Those of a rank out of a whole layer."""
    module = ExpertParallelExperts(whole.num_experts, H, I, group, config=POW2, **options)
    experts = slice(rank * whole.num_experts // count, (rank + 1) * whole.num_experts // count)
    module.load_state_dict({name: p[experts] for name, p in whole.state_dict().items()})
    return module


def local(whole: Gradients, rank: int, count: int) -> Gradients:
    """Of the experts those of this rank."""
    size = 2 * count
    mine = slice(rank * size // count, (rank + 1) * size // count)
    return {name: x[mine] if name.startswith("experts.") else x for name, x in whole.items()}


def build_parallel(group: Any, rank: int, count: int, seed: int = 0, **options: Any) -> tuple[Layer, Layer]:
    """A layer with all experts, and one with those of a rank. All else has another seed."""
    size = 2 * count
    whole = build(lambda: SwiGLUExperts(size, H, I, config=POW2), num_experts=size)
    model = build(lambda: parallel_experts(group, whole.experts, rank, count, **options), seed, num_experts=size)
    if seed == 0:
        for name in ("router", "skipped"):
            getattr(model, name).load_state_dict(getattr(whole, name).state_dict())
    return whole, model


def case_ddp_leaves_the_experts_to_their_ranks(rank: Rank) -> None:
    for dispatch in Dispatch:
        whole, model = build_parallel(None, rank.number, rank.count, dispatch=dispatch)
        experts = {name: p.clone() for name, p in model.experts.state_dict().items()}
        names = ["experts.w_gate_up", "experts.w_down", "experts.dropped"]
        expect(exclude_from_ddp(model) == names)
        expect(exclude_from_ddp(model) == names, "twice changes nothing")
        ddp = DistributedDataParallel(model)
        same_bits(model.experts.state_dict(), experts, list(experts))
        for step in range(2):
            with ddp.no_sync() if not step else nullcontext():
                loss_of(ddp, rank.number, step).backward()
        expected = local(averaged(whole, rank.count, steps=2), rank.number, rank.count)
        actual = gradients(ddp)
        close(actual, expected, 40, ["skipped.weight", "skipped.bias"])
        close(actual, expected, 20)  # weight gradients: tokens of all ranks share scales


def case_what_is_dropped_is_counted_on_each_rank(rank: Rank) -> None:
    """DDP gives all ranks the buffers of the first."""
    _, model = build_parallel(None, rank.number, rank.count, capacity=3)
    exclude_from_ddp(model)
    ddp = DistributedDataParallel(model)
    with torch.no_grad():
        ddp(batch(rank.number))
        dropped = int(model.experts.dropped)
        model.experts.dropped.add_(1000 * rank.number)
        ddp(batch(rank.number))
    expect(dropped > 0)
    expect(int(model.experts.dropped) == 2 * dropped + 1000 * rank.number)


def case_experts_that_ddp_would_average_are_refused(rank: Rank) -> None:
    _, model = build_parallel(None, rank.number, rank.count)
    ddp = DistributedDataParallel(model)
    for context in (nullcontext, ddp.no_sync, torch.no_grad):
        with context(), pytest.raises(ValueError, match=r"call fp8moe\.distributed\.exclude_from_ddp\(model\), or"):
            ddp(batch(rank.number))
    with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel already"):
        exclude_from_ddp(ddp)
    with pytest.raises(ValueError, match="model is a Layer without ExpertParallelExperts"):
        exclude_from_ddp(build(swiglu))


def case_replicas_of_experts_have_a_ddp_of_their_own(rank: Rank) -> None:
    """Pairs of ranks share experts; who has the same ones averages them."""
    mesh = init_device_mesh("cpu", (rank.count // 2, 2), mesh_dim_names=("dp", "ep"))
    replica, number = divmod(rank.number, 2)
    whole, model = build_parallel(mesh["ep"], number, 2)
    with torch.no_grad():
        for p in model.experts.parameters():
            p += replica  # until DDP makes them those of the first replica
    model.experts.dropped.fill_(rank.number)
    model.experts = DistributedDataParallel(model.experts, process_group=mesh["dp"].get_group())
    exclude_from_ddp(model)
    ddp = DistributedDataParallel(model)
    loss_of(ddp, rank.number).backward()
    expected = local(averaged(whole, rank.count), number, 2)
    close(gradients(ddp), expected, 20)
    close(gradients(ddp), expected, 40, ["skipped.weight", "skipped.bias"])
    expect(model.experts.module.dropped == rank.number)


CASES: dict[str, Callable[[Rank], None]] = {
    name.removeprefix("case_"): function for name, function in list(globals().items()) if name.startswith("case_")
}
