"""`python -m fp8moe`: the commands that belong to the library itself."""

import pytest
import torch

from fp8moe import doctor, grouped_mm
from fp8moe.__main__ import main
from fp8moe.config import FP8Config


def test_doctor_tells_what_runs_and_that_it_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    assert "fp8moe on cpu, KernelPreference.AUTO" in printed
    assert "forward  EMULATED" in printed
    assert "self-check, against fp32 (at least 27 dB)\n  EMULATED 2" in printed  # 27 to 29.9 dB
    assert "dB: ok" in printed


def test_doctor_fails_where_results_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, config: FP8Config) -> torch.Tensor:
        return grouped_mm(a, b, offs - 1, config=config)

    monkeypatch.setattr(doctor, "grouped_mm", wrong)
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["doctor", "train", "evaluate", "bench", "tune"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert command in capsys.readouterr().out


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["dance"])
    assert exit_.value.code == 2
    assert "dance" in capsys.readouterr().err
