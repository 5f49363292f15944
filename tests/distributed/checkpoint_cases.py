"""What each rank asserts of checkpoints of `ExpertParallelExperts`: cases as those of `cases.py`."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fp8moe.distributed import ExpertParallelExperts, exclude_from_ddp
from tests.distributed.cases import Rank, alike, close, expect, same_bits
from tests.distributed.problems import POW2, H, I, Problem, differ_in_rank, in_parallel

E = 8
"""Of all ranks, however many."""


def build(mesh: DeviceMesh, seed: int, **options: Any) -> Any:
    torch.manual_seed(100 * seed + mesh.get_local_rank())
    return ExpertParallelExperts(E, H, I, mesh, config=POW2, as_dtensors=True, **options)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, count: int) -> Tensor:
    """One step with the same tokens, however many ranks have them; the output."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, H, generator=generator)
    ids, weights = torch.rand(64, E, generator=generator).topk(2)[1], torch.rand(64, 2, generator=generator)
    mine = slice(64 * rank // count, 64 * (rank + 1) // count)
    out: Tensor = module(hidden[mine], ids[mine], weights[mine])
    optimizer.zero_grad()
    out.square().sum().backward()
    optimizer.step()
    return out.detach()


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.full_tensor().clone() if isinstance(p, DTensor) else p.clone()
        for name, p in module.state_dict().items()
    }


@contextmanager
def shared_folder(rank: Rank) -> Iterator[str]:
    names = [tempfile.mkdtemp() if rank.number == 0 else ""]
    dist.broadcast_object_list(names)
    yield names[0]
    dist.barrier()
    if rank.number == 0:
        shutil.rmtree(names[0])


def case_a_checkpoint_of_half_of_the_ranks_is_loaded_by_all(rank: Rank) -> None:
    """Parameters and the state of their optimizer; training goes on."""
    half = rank.count // 2
    few, all_ranks = DeviceMesh("cpu", list(range(half))), init_device_mesh("cpu", (rank.count,))
    restored = build(all_ranks, seed=1)
    optimizer = torch.optim.AdamW(restored.parameters(), lr=0.01)
    with shared_folder(rank) as folder:
        if rank.number < half:
            saved = build(few, seed=0)
            its_optimizer = torch.optim.AdamW(saved.parameters(), lr=0.01)
            train(saved, its_optimizer, rank.number, half)
            model_state, optimizer_state = get_state_dict(saved, its_optimizer)
            group = few.get_group()
            save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder, process_group=group)
            at_save = whole(saved)
            expected = train(saved, its_optimizer, rank.number, half)
            after = whole(saved)
        dist.barrier()
        model_state, optimizer_state = get_state_dict(restored, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        load(state, checkpoint_id=folder)
        set_state_dict(restored, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    expect(restored.w_gate_up.to_local().shape == (E // rank.count, 2 * I, H))
    loaded = whole(restored)
    out = train(restored, optimizer, rank.number, rank.count)
    trained = whole(restored)
    if rank.number < half:
        same_bits(loaded, at_save, list(at_save))
        close(trained, after, 40)
        expect(any(not torch.equal(at_save[name], after[name]) for name in after))
    if rank.number == 0:
        close({"out": out}, {"out": expected[: len(out)]}, 40)


def case_dtensors_compute_what_plain_parameters_do(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.count,), mesh_dim_names=("ep",))
    problem = Problem.draw([30] * rank.count, 2, 2, differ_in_rank)
    expected = in_parallel(problem, rank.number, mesh["ep"])
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    for cached in (False, True):
        module: Any = ExpertParallelExperts(
            2 * rank.count, H, I, mesh["ep"], config=POW2, as_dtensors=True, cache_weights=cached
        )
        expect(module.w_down.shape == (2 * rank.count, H, I))
        with torch.no_grad():
            module(problem.hidden[tokens], problem.ids[tokens], problem.weights[tokens])  # of other weights
            module.w_gate_up.to_local().copy_(problem.w_gate_up[experts])
            module.w_down.to_local().copy_(problem.w_down[experts])
        out = module(problem.hidden[tokens], problem.ids[tokens], problem.weights[tokens])
        out.backward(problem.dout[tokens])
        actual = {name: getattr(module, name).grad.to_local() for name in ("w_gate_up", "w_down")} | {
            "out": out.detach()
        }
        alike(actual, expected, list(actual))
    norm: Any = nn.utils.get_total_norm([p.grad for p in module.parameters()])
    norm, squares = norm.full_tensor(), expected["w_gate_up"].square().sum() + expected["w_down"].square().sum()
    dist.all_reduce(squares)
    expect(abs(norm / squares.sqrt() - 1) < 1e-3)


def case_whole_tensors_are_loaded_by_all(rank: Rank) -> None:
    module, other = (build(init_device_mesh("cpu", (rank.count,)), seed) for seed in (0, 1))
    tensors = whole(other)
    its_own: dict[str, Any] = dict(tensors)  # it distributes them in place
    set_model_state_dict(module, its_own, options=StateDictOptions(full_state_dict=True))
    same_bits(whole(module), tensors, list(tensors))


def case_dtensors_are_made_without_memory(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.count,))
    with torch.device("meta"):
        module: Any = ExpertParallelExperts(2 * rank.count, H, I, mesh, config=POW2, as_dtensors=True)
    module.to_empty(device="cpu")
    torch.manual_seed(rank.number)
    module.reset_parameters()
    expect(isinstance(module.w_down, DTensor))
    expect(0 < module.w_down.to_local().std() < I**-0.5)
    expect(module(torch.randn(5, H), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)).any())


def case_dtensors_and_ddp(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.count,))
    experts = build(mesh, seed=0)
    model, before = nn.ModuleList([experts, nn.Linear(4, 4)]), whole(experts)
    exclude_from_ddp(model)
    DistributedDataParallel(model)
    same_bits(whole(experts), before, list(before))


def case_fsdp_takes_another_dimension_of_the_mesh(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.count // 2, 2), mesh_dim_names=("dp", "ep"))
    plain, sharded = build(mesh["ep"], seed=0), build(mesh["ep"], seed=0)
    fully_shard(sharded, mesh=mesh["dp"])
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for module in (plain, sharded):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        train(module, optimizer, rank.number, rank.count)
    for mine, its in zip(sharded.parameters(), plain.parameters(), strict=True):
        grad = its.grad.full_tensor()
        dist.all_reduce(grad, group=mesh["dp"].get_group())
        close({"grad": mine.grad.full_tensor()}, {"grad": grad}, 40)
        expect(mine.shape == (E, *its.shape[1:]))


def case_one_norm_of_all_gradients(rank: Rank) -> None:
    """As docs/distributed.md clips them."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), build(init_device_mesh("cpu", (rank.count,)), seed=0)])
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    parts = [[p for p in model.parameters() if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    norms: list[Any] = [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
    total = torch.stack([norms[0], norms[1].full_tensor()]).norm()
    expect(abs(float(total) / (2 * (20 + E * H * 3 * I) ** 0.5) - 1) < 1e-3)
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, 1.0, total)
    for p in model.parameters():
        grad: Any = p.grad
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        expect(((local * total / 2 - 1).abs() < 1e-3).all())


def case_dtensors_need_a_mesh(rank: Rank) -> None:
    with pytest.raises(
        TypeError, match="as_dtensors needs a DeviceMesh of one dimension as group, and group is a NoneT"
    ):
        ExpertParallelExperts(E, H, I, None, as_dtensors=True)


CASES: dict[str, Callable[[Rank], None]] = {
    name.removeprefix("case_"): function for name, function in list(globals().items()) if name.startswith("case_")
}
