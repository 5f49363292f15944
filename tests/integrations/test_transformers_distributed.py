"""transformers' own `DistributedConfig`, on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.transformers_support import build, hf

ranks = pytest.importorskip("tests.integrations.transformers_ranks", exc_type=ImportError)

ROOT = Path(__file__).parents[2]


def test_trains_as_in_one_process(tmp_path: Path) -> None:
    hf.register(strict=True)
    model = build("Qwen3Moe", moe_intermediate_size=256)  # 128 on each rank, with tensor parallelism
    model.save_pretrained(tmp_path)
    expected = ranks.steps(model.train())
    command = [sys.executable, "-m", ranks.__name__, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(ranks.RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, outputs[rank]
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False)
        assert set(found) == set(ranks.WAYS)
        for way, actual in found.items():
            assert actual["runs"] == {"fp8moe in FP8"}, way
            assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-3), way
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]
