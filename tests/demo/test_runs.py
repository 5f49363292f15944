"""A run on disk: never overwritten, never half written."""

from pathlib import Path
from typing import IO

import pytest
import torch

from fp8moe.demo.runs import Run
from fp8moe.demo.training import StepRecord

from .support import tiny_config

RECORD: StepRecord = {
    "step": 1, "loss": 0.1 + 0.2, "balance_loss": 1.0, "grad_norm": 1 / 3, "lr": 1e-3, "seconds": 0.5,
    "tokens_per_second": 9.0, "val_loss": 2 / 7,
}  # fmt: skip


def test_new_runs_are_numbered(tmp_path: Path) -> None:
    config = tiny_config()
    (tmp_path / "run-2").mkdir()
    names = [Run.create(tmp_path, None, config, "sha").path.name for _ in range(2)]
    assert names == ["run-1", "run-3"]


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs", "mine", tiny_config(seed=7), "sha")
    with pytest.raises(ValueError, match=r"mine is there already: continue it with --resume .*another --name"):
        Run.create(tmp_path / "runs", "mine", tiny_config(), "sha")
    assert Run.open(tmp_path / "runs", "mine") == Run.open(tmp_path, str(run.path)) == run


def test_an_output_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in (None, "mine"):
        for where in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ValueError, match=r"--output-dir .*file.*; pass another directory"):
                Run.create(where, name, tiny_config(), "sha")


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no run is there, nor in .*: pass the directory of a run"):
        Run.open(tmp_path, "absent")
    run = Run.create(tmp_path, "present", tiny_config(), "sha")
    for broken in ("{", "{}", '{"config": {"wings": 2}}', '{"config": {"layers": 0}}'):
        (run.path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match="is not the configuration of a run"):
            Run.open(tmp_path, "present")


def test_records_come_back_exactly_and_those_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    run = Run.create(tmp_path, None, tiny_config(), "sha")
    assert run.records("fp8") == []
    steps: list[StepRecord] = [{**RECORD, "step": step} for step in range(1, 6)]
    for step in steps:
        run.append("fp8", step)
        assert run.records("fp8")[-1] == step  # at once, for who watches and for who is killed
    file = run.file("fp8", "metrics.jsonl")
    file.write_text(file.read_text() + '{"step": 6, "lo')  # killed while writing
    assert run.records("fp8") == steps
    run.rewind("fp8", 3)
    assert run.records("fp8") == steps[:3]
    run.append("fp8", steps[3])
    assert run.records("fp8") == steps[:4]


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, None, tiny_config(), "sha")
    assert run.load_checkpoint("fp8") is None
    run.save_checkpoint("fp8", {"step": 1})

    def write_half(state: object, stream: IO[bytes]) -> None:
        stream.write(b"ne")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint("fp8", {"step": 2})
    assert run.load_checkpoint("fp8") == {"step": 1}
