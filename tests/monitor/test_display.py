"""What `python -m fp8moe train` shows of a monitor."""

import re
from pathlib import Path

import pytest
import torch

from fp8moe.demo.training import Trainer
from tests.demo.support import tiny_flags, train

FLAGS = ("--precision=fp8", "--eval-every=0", "--layers=2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {line} says {line * 7 % 97}\n" for line in range(3000)))
    return path


@pytest.fixture(autouse=True)
def _writes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own text, which takes long."""
    monkeypatch.setattr("fp8moe.demo.session._SAMPLE", 1)


def test_readings_are_shown(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*tiny_flags(), *FLAGS, "--data", text, "--output-dir", tmp_path / "runs") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"FP8 1/8 SQNR \d\d\.\d dB or more, underflow [\d.]+% or less; busiest expert [\d.]+x", printed)


def test_where_nan_began_is_shown(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def poisoned(self: Trainer) -> object:
        if self.step == 2:
            with torch.no_grad():
                self.model.blocks[1].moe.experts.w_down[0] = float("nan")  # type: ignore[union-attr, operator]
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    train(*tiny_flags(), *FLAGS, "--data", text, "--output-dir", tmp_path / "runs")
    printed = " ".join(capsys.readouterr().out.split())
    assert "FP8 blocks.1.moe.experts: output is NaN or infinite from step 3 on" in printed
