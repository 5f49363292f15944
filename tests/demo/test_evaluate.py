"""Checkpoints of a run, evaluated with quantized experts."""

from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.demo.command import open_run
from fp8moe.demo.evaluate import evaluate

from .support import metrics, tiny_flags, train


def test_losses_stand_beside_those_of_bf16_and_fp8(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*tiny_flags(), "--data", text, "--output-dir", tmp_path) == 0
    capsys.readouterr()
    losses = evaluate(*open_run(tmp_path, "run-1"), ("int8", "int4"), 64)
    assert list(losses) == ["fp8", "bf16"]
    for trained, found in losses.items():
        assert list(found) == ["bf16", "fp8", "int8", "int4"]
        assert found[trained] == pytest.approx(metrics(tmp_path / "run-1", trained)[-1]["val_loss"])
        assert all(abs(found[name] / found["bf16"] - 1) < 0.002 for name in ("int8", "int4"))
        assert len(set(found.values())) == 4  # each was computed in its own way
    assert main(["evaluate", "run-1", "--output-dir", str(tmp_path), "--experts=int8"]) == 0
    printed = capsys.readouterr().out
    assert "INT8" in printed
    assert "INT4" not in printed
    assert f"{losses['fp8']['fp8']:.4f}" in printed
    for checkpoint in (tmp_path / "run-1").glob("*/checkpoint.pt"):
        checkpoint.unlink()
    assert main(["evaluate", "run-1", "--output-dir", str(tmp_path)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run-7", "--output-dir", str(tmp_path)]) == 2
    assert "run-7: no run is there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "run-7", "--experts=int3"])
    assert "'int3' is not one of int8, int4" in capsys.readouterr().err
