"""Runs that stop, by a signal or a crash, and go on as if they had not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fp8moe.demo.interrupt import stop_on_signals
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import Precision
from fp8moe.demo.training import StepRecord

from .support import STEPS, metrics, tiny_flags, train


class CrashError(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, precision: Precision, step: int, how: signal.Signals | None) -> None:
    """Send a signal, or crash, when a step has been recorded but not yet saved."""
    append = Run.append

    def append_and_stop(self: Run, at: Precision, record: StepRecord) -> None:
        append(self, at, record)
        if (at, record["step"]) == (precision, step):
            if how is None:
                raise CrashError
            signal.raise_signal(how)

    monkeypatch.setattr(Run, "append", append_and_stop)


def test_a_run_stopped_and_resumed_has_the_losses_of_one_that_was_not(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ("--output-dir", tmp_path)
    flags = (*tiny_flags(), "--data", text, *where)
    assert train(*flags, "--name", "whole") == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    with monkeypatch.context() as patch:
        stop_after(patch, "fp8", 4, signal.SIGINT)  # saved on request, between two checkpoints
        assert train(*flags, "--name", "parts") == 130
    assert f"--resume {parts}" in capfd.readouterr().out
    assert metrics(parts, "fp8") == metrics(whole, "fp8")[:4]
    assert (parts / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (parts / "bf16" / "metrics.jsonl").exists()

    with monkeypatch.context() as patch:
        stop_after(patch, "bf16", 5, None)  # the last checkpoint is of step 3
        with pytest.raises(CrashError):
            train("--resume", parts)
    assert len(metrics(parts, "bf16")) == 5

    with monkeypatch.context() as patch:
        stop_after(patch, "bf16", 6, signal.SIGTERM)
        assert train("--resume", "parts", *where) == 130

    assert train("--resume", "parts", *where) == 0
    for precision in ("fp8", "bf16"):
        assert [record["step"] for record in metrics(whole, precision)] == list(range(1, STEPS + 1))
        assert metrics(parts, precision) == metrics(whole, precision)  # every float of every line
        states = [torch.load(run / precision / "checkpoint.pt", weights_only=True) for run in (parts, whole)]
        for mine, its in zip(states[0]["model"].values(), states[1]["model"].values(), strict=True):
            assert torch.equal(mine, its)
        assert (parts / precision / "sample.txt").read_bytes() == (whole / precision / "sample.txt").read_bytes()
    assert metrics(whole, "fp8") != metrics(whole, "bf16")

    before = (parts / "fp8" / "metrics.jsonl").read_bytes()
    assert train("--resume", parts) == 0  # nothing is left to do
    assert (parts / "fp8" / "metrics.jsonl").read_bytes() == before


def test_another_seed_gives_other_losses(text: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        flags = (*tiny_flags(precision="bf16", steps=3), "--data", text, "--output-dir", tmp_path)
        assert train(*flags, "--name", f"seed{seed}", "--seed", seed) == 0
    first, second = (metrics(tmp_path / f"seed{seed}", "bf16") for seed in (0, 1))
    assert first[-1]["loss"] != second[-1]["loss"]


def test_a_signal_before_the_first_step_leaves_a_run_to_resume(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "rewind", lambda *_: signal.raise_signal(signal.SIGINT))
        flags = (*tiny_flags(precision="bf16", steps=2), "--data", text, "--output-dir", tmp_path)
        assert train(*flags, "--name", "early") == 130
    assert Run.open(tmp_path, "early").records("bf16") == []
    with monkeypatch.context() as patch:
        stop_after(patch, "bf16", 2, signal.SIGINT)  # too late to keep it from its end
        assert train("--resume", tmp_path / "early") == 0
    assert len(metrics(tmp_path / "early", "bf16")) == 2


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_real_process(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    flags = [*tiny_flags(steps=100_000), "--data", str(text), "--output-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "fp8moe", "train", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 300  # a hang; a busy machine starts slowly
            while not (run / "fp8" / "metrics.jsonl").exists() or len(metrics(run, "fp8")) < 5:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "stopping after this step" in error
    assert f"--resume {run}" in out
    state = torch.load(run / "fp8" / "checkpoint.pt", weights_only=True)
    assert state["step"] == len(metrics(run, "fp8")) >= 5
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_two_runs_of_one_seed_have_the_same_bits_on_a_gpu(compiled: str, text: Path, tmp_path: Path) -> None:
    # Enough sequences, heads and positions for the blocks of attention's backward to add up in another order each time.
    sizes = tiny_flags(device="cuda", layers=2, hidden=512, seq_len=1024, batch_size=8, steps=6, warmup=0)
    for name in ("one", "two"):  # processes of their own: cuBLAS is told before its first product
        flags = [*sizes, "--data", text, "--output-dir", tmp_path, "--name", name, compiled]
        subprocess.run([sys.executable, "-m", "fp8moe", "train", *map(str, flags)], check=True)
    for precision in ("fp8", "bf16"):
        one, two = (metrics(tmp_path / name, precision) for name in ("one", "two"))
        assert len(one) == 6
        assert one == two
