"""transformers' own `DistributedConfig`, and DDP, on two and four processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.transformers_support import COMMON, build, hf, transformers
from tests.measures import assert_same_bits

ranks = pytest.importorskip("tests.integrations.transformers_ranks", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
HIDDEN = COMMON["hidden_size"]


def run(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each of `count` ranks saw."""
    command = [sys.executable, "-m", ranks.__name__, str(folder)]
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(count)],
            cwd=ROOT,
            env=on_cpu,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, outputs[rank]
    return [torch.load(folder / f"rank-{count}-{rank}.pt", weights_only=False) for rank in range(count)]


def test_trains_as_in_one_process(tmp_path: Path) -> None:
    hf.register(strict=True)
    model = build("Qwen3Moe", moe_intermediate_size=256)  # 128 on each rank, with tensor parallelism
    model.save_pretrained(tmp_path)

    def expected(*batches: int) -> list[list[float]]:
        """In one process, of all batches."""
        return ranks.steps(ranks.load(tmp_path, None), batches)

    one, two, four = expected(0), expected(0, 1), expected(0, 1, 2, 3)
    assert one[-1][0] < 0.95 * one[0][0]
    of_two = run(tmp_path, 2)
    for rank, found in enumerate(of_two):
        assert set(found) == {*ranks.SHARED, *ranks.OWN, "ddp", "trained"}
        for way in ranks.SHARED:
            check(found[way], way, one, 0)
        for way in (*ranks.OWN, "ddp"):
            check(found[way], way, two, rank)
    of_four = run(tmp_path, 4)
    copies, pairs = ranks.OF_FOUR
    for rank, found in enumerate(of_four):
        check(found[copies], copies, four, rank)
        check(found[pairs], pairs, two, rank // 2)

    # Whoever reads a checkpoint of two ranks.
    trained = of_two[0]["trained"]
    one_process = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    for found in (of_two[1]["trained"], *(ranks_found["restored"] for ranks_found in of_four), one_process):
        assert found.keys() == trained.keys()
        for name, weight in trained.items():
            assert_same_bits(found[name], weight)


def check(actual: dict[str, Any], way: str, expected: list[list[float]], of_batch: int) -> None:
    """Losses as those of one process, and how tokens travelled."""
    assert actual["runs"] == {"fp8moe in FP8"}, way
    losses = [step[of_batch] for step in expected]
    assert [step[0] for step in actual["losses"]] == pytest.approx(losses, rel=1e-3), way
    dispatch = {"fp8moe": "FP8", "fp8moe_bf16": "BF16"}.get(ranks.WAYS.get(way, {}).get("ep_implementation"))
    assert actual["why"].endswith(f"; tokens travel to their ranks in {dispatch}") == (dispatch is not None), way
    sizes = [size for size in actual["bytes"] if size >= HIDDEN]
    assert bool(sizes) == (dispatch is not None), way
    if dispatch is not None:
        assert (min(sizes) < 1.5 * HIDDEN) == (dispatch == "FP8"), way
