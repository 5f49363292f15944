"""Layers that are not `SwiGLUExperts` alone: of transformers, converted, of torchtitan, on several ranks, wrapped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fp8moe
from fp8moe import FP8Config, SwiGLUExperts
from fp8moe.distributed import Dispatch, ExpertParallelExperts, exclude_from_ddp, gather_in_fp8
from fp8moe.monitor import Monitor, Reading, watch

H, I, E, T, K = 128, 128, 4, 60, 2  # noqa: E741
OPERANDS = {f"{name}.{kind}" for name in ("activation", "d_gate_up") for kind in ("rows", "tokens")}
WEIGHTS = {"w_gate_up", "w_down"}


def read(monitor: Monitor) -> Reading:
    reading = monitor.read()
    assert reading is not None
    monitor.close()
    assert reading.not_finite is None
    assert reading.unseen == ()
    for layer in reading.layers.values():
        assert all(x.sqnr_db is not None and x.sqnr_db > 26 for x in layer.operands.values())
    return reading


class Model(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.before, self.experts = nn.Linear(H, H), experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return self.experts(self.before(x), ids, weights)


def step(model: nn.Module) -> None:
    out = model(torch.randn(T, H), torch.randint(E, (T, K)), torch.rand(T, K))
    out.backward(torch.randn_like(out))


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_transformers(family: str) -> None:
    """GptOss has biases, interleaved gate and up, and stores its weights transposed."""
    support = pytest.importorskip("tests.integrations.transformers_support", exc_type=ImportError)
    model = support.build(family).train()
    monitor = watch(model, every=1, warn=False)
    ids = support.batch(0)
    model(input_ids=ids, labels=ids).loss.backward()
    reading = read(monitor)
    assert [*reading.layers] == [f"model.layers.{number}.mlp.experts" for number in range(2)]
    for layer in reading.layers.values():
        assert {*layer.operands} > OPERANDS | WEIGHTS
        assert sum(layer.tokens_per_expert) == ids.numel() * 2


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, I, H) / 16)
        self.w3 = nn.Parameter(torch.randn(E, I, H) / 16)
        self.w2 = nn.Parameter(torch.randn(E, H, I) / 16)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(E):
            token, place = (ids == expert).nonzero(as_tuple=True)
            rows = x[token]
            rows = (nn.functional.silu(rows @ self.w1[expert].t()) * (rows @ self.w3[expert].t())) @ self.w2[expert].t()
            out = out.index_add(0, token, rows * weights[token, place, None])
        return out


def test_converted_models() -> None:
    """Also where the monitor comes first."""
    for watch_first in (False, True):
        model = Model(HandWritten())
        monitor = watch(model, every=1) if watch_first else None
        assert fp8moe.convert(model, strict=True).converted == 1
        monitor = monitor or watch(model, every=1)
        step(model)
        layer = read(monitor).layers["experts"]
        assert {*layer.operands} > OPERANDS | WEIGHTS
        assert sum(layer.tokens_per_expert) == T * K


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # torchtitan's router asks for fp32
@pytest.mark.parametrize("override", ["experts", "grouped_mm", "expert_parallel"])
def test_torchtitan(override: str) -> None:
    titan = pytest.importorskip("tests.integrations.test_torchtitan", exc_type=ImportError)
    model = titan.build(f"fp8moe.integrations.torchtitan.{override}").train()
    monitor = watch(model, every=1, warn=False)
    titan.loss_of(model, 0).backward()
    reading = read(monitor)
    assert reading.layers
    for name, layer in reading.layers.items():
        assert name.endswith("experts")
        if override != "grouped_mm":
            assert {*layer.operands} > OPERANDS | WEIGHTS
        else:
            assert {f"product{number}.d_out.tokens" for number in range(3)} < {*layer.operands}
        assert sum(layer.tokens_per_expert) == 4 * titan.LENGTH * titan.K


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dispatch", Dispatch)
@pytest.mark.parametrize("capacity", [None, T + 7])
def test_experts_of_several_ranks(dispatch: Dispatch, capacity: int | None) -> None:
    model = Model(ExpertParallelExperts(E, H, I, None, dispatch=dispatch, capacity=capacity))
    monitor = watch(model, every=1)
    step(model)
    layer = read(monitor).layers["experts"]
    assert OPERANDS | WEIGHTS | {"hidden.rows", "d_output.rows"} <= {*layer.operands}
    assert sum(layer.tokens_per_expert) == T * K


@pytest.mark.usefixtures("one_rank")
def test_ddp() -> None:
    model = Model(SwiGLUExperts(E, H, I))
    wrapped = DistributedDataParallel(model)
    monitor = watch(wrapped, every=1)
    step(wrapped)
    assert {"w_down", "d_output.tokens"} < {*read(monitor).layers["experts"].operands}
    experts = Model(ExpertParallelExperts(E, H, I, None))
    exclude_from_ddp(experts)
    monitor = watch(experts, every=1)
    step(DistributedDataParallel(experts))
    assert [*read(monitor).layers] == ["experts"]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize("watch_first", [False, True])
def test_fsdp(in_fp8: bool, watch_first: bool) -> None:
    model = Model(SwiGLUExperts(E, H, I, config=FP8Config(allow_bf16=False)))
    monitor = watch(model, every=1) if watch_first else None
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.experts, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if in_fp8:
        gather_in_fp8(model.experts, "w_gate_up", "w_down")
    monitor = monitor or watch(model, every=1)
    step(model)
    layer = read(monitor).layers["experts"]
    assert OPERANDS | (set() if in_fp8 else WEIGHTS) < {*layer.operands}
