"""Two GPUs of one host, with NCCL: expert parallelism, DDP, transformers' `DistributedConfig`, and DataParallel."""

import importlib
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fp8moe
from tests.gpu.multi_gpu_cases import CASES, POW2, Model
from tests.gpu.ranks import Rank, run
from tests.measures import sqnr


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each case. All run in one set of processes: starting these takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    if not why_no_transformers():
        from tests.integrations.transformers_support import build

        build("Qwen3Moe", "eager").save_pretrained(folder / "model")
    cases = [case for name, case in CASES.items() if name != "case_transformers" or not why_no_transformers()]
    return run(cases, folder)


@cache
def why_no_transformers() -> str:
    """Empty if fp8moe's integration can be imported: transformers is there, and not too old."""
    try:
        importlib.import_module("fp8moe.integrations.transformers")
    except ImportError as error:
        return str(error)
    return ""


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", CASES)
def test_ranks(outcome: dict[str, str], case: str) -> None:
    if case == "case_transformers" and why_no_transformers():
        pytest.skip(why_no_transformers())
    assert not outcome[case], outcome[case]


@pytest.mark.multi_gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # in the threads of DataParallel
@pytest.mark.parametrize("cached", [False, True])
def test_data_parallel(cached: bool) -> None:
    """Replicas quantize the copies that DataParallel makes of the weights, in each forward."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = Model(fp8moe.SwiGLUExperts(8, 512, 256, config=POW2, device=device, cache_weights=cached), 512, 8, device)
    hidden = torch.randn(600, 512, device=device)
    results = []
    replicated: Any = nn.DataParallel(model, device_ids=[0, 1])
    for call in (model, replicated, replicated):
        model.zero_grad()
        out = call(hidden)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for again in results[1:]:
        assert len(again) == 4
        assert sqnr(again[0], results[0][0]) >= 50
        # Weight gradients: scales are those of half of the tokens.
        assert all(sqnr(actual, expected) >= 22 for actual, expected in zip(again, results[0], strict=True))


def passes(rank: Rank) -> None:
    dist.barrier()


def fails_on_the_last(rank: Rank) -> None:
    """The first waits for it: for ever, if nobody ended it."""
    if rank.number == rank.count - 1:
        raise ValueError("that is wrong")
    dist.barrier()


def comes_later(rank: Rank) -> None:
    dist.barrier()


def hangs(rank: Rank) -> None:
    time.sleep(60)


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    """Long before the timeout of the process group, which is half an hour. On a CPU."""
    outcome = run([passes, fails_on_the_last, comes_later], tmp_path, seconds=60, device_type="cpu")
    assert outcome["passes"] == ""
    for name in ("fails_on_the_last", "comes_later"):
        assert "fails_on_the_last on rank 1" in outcome[name]
        assert "ValueError: that is wrong" in outcome[name]


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    outcome = run([hangs], tmp_path, count=1, seconds=4, device_type="cpu")
    assert outcome == {"hangs": "it did not end within 4 s"}
