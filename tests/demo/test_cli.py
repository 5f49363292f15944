"""The flags of `python -m fp8moe train`, and the files of a run."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fp8moe.demo.runs import Run
from fp8moe.demo.settings import RunConfig

from .support import metrics, tiny_config, tiny_flags, train


def test_a_run_and_its_files(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*tiny_flags(), "--data", text, "--output-dir", tmp_path) == 0
    run = tmp_path / "run-1"
    assert Run.open(tmp_path, "run-1").config == tiny_config(data=str(text))
    for precision in ("fp8", "bf16"):
        steps = metrics(run, precision)
        assert [step["step"] for step in steps] == list(range(1, 9))
        assert [step["step"] for step in steps if "val_loss" in step] == [3, 6, 8]
        assert steps[-1]["loss"] < steps[0]["loss"]
        assert (run / precision / "checkpoint.pt").stat().st_size > 100_000
        assert len((run / precision / "sample.txt").read_bytes()) == 128 + 256
    gap = metrics(run, "fp8")[-1]["loss"] / metrics(run, "bf16")[-1]["loss"] - 1
    assert 0 < abs(gap) < 0.02
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "EMULATED" in printed
    assert f"{gap:+.2%}" in printed
    assert re.search(r"BF16 8/8  loss \d\.\d+  [\d,]+ tokens/s  held-out text \d\.\d+", printed)


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for entry in fields(RunConfig):
        assert f"--{entry.name.replace('_', '-')}" in printed


@pytest.mark.parametrize(("flags", "tile"), [((), None), (("--token-tile=128",), 128)])
def test_token_tiles_are_the_librarys_unless_named(
    flags: tuple[str, ...], tile: int | None, text: Path, tmp_path: Path
) -> None:
    assert train(*tiny_flags(), "--steps=1", "--data", text, "--output-dir", tmp_path, *flags) == 0
    assert Run.open(tmp_path, "run-1").config.fp8.wgrad_token_tile == tile


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--intermediate=129", "intermediate is 129; .* use 136"),
        ("--layers=0", "layers is 0; it must be at least 1"),
        ("--top-k=9", "top_k is 9, more than the 4 experts"),
        ("--microbatches=3", "microbatches is 3, which does not divide batch_size=4"),
        ("--dead-experts=3", "top_k is 2, more than the 1 experts"),
        ("--bad-documents=2", "bad_documents is 2.0; it is a share"),
        ("--token-tile=64", "token_tile is 64; it must be one of"),
        ("--heads=3", "heads is 3, which does not divide hidden=128"),
        ("--heads=128", "heads is 128, which does not divide"),
        ("--lr=0", "lr is 0.0; it must be positive"),
        ("--lr=nan", "lr is nan; it must be positive"),
        ("--steps=0", "steps is 0; it must be at least 1"),
        ("--seed=-1", "seed is -1; it must be at least 0"),
        ("--weight-decay=nan", "weight_decay is nan; it must be at least 0"),
        ("--device=toaster", "device is 'toaster'"),
        ("--backend=deepgemm", "backend is 'deepgemm': .* on cpu: .*GPU"),
        ("--data=/nowhere", "data is /nowhere, which does not exist: pass"),
        ("--seq-len=60000", "seq_len=60000"),
        ("--resume=absent", "absent: no run is there"),
    ],
)
def test_flags_that_cannot_be_met(
    flags: str, error: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    data = () if "--data" in flags else ("--data", text)
    assert train(*tiny_flags(), *data, "--output-dir", runs, *flags.split()) == 2
    printed = capsys.readouterr().err
    assert re.search(error, printed.replace("\n", " "))
    assert printed.startswith("error: ")
    assert not runs.exists()


def test_flags_that_cannot_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--steps=many", "--backend=magic", "--precision=fp16", "--precision=fp8,fp8", "--resume=x --name=y"):
        with pytest.raises(SystemExit) as stop:
            train(*flag.split())
        assert stop.value.code == 2
        assert flag.split("=")[0] in capsys.readouterr().err


def test_resume_keeps_the_configuration(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*tiny_flags(precision="bf16", steps=2), "--data", text, "--output-dir", tmp_path, "--name", "mine")
    assert train(*flags) == 0
    assert train(*flags) == 2
    assert "is there already: continue it with --resume" in capsys.readouterr().err

    run = tmp_path / "mine"
    same = ("--steps", 2, "--data", text, "--precision=bf16")
    assert train("--resume", run, *same) == 0
    for flag, value in (("steps", 3), ("lr", 0.1), ("experts", 8), ("precision", "fp8,bf16"), ("data", "/else")):
        capsys.readouterr()
        assert train("--resume", run, f"--{flag}", value) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {flag} is ")
        assert f"leave --{flag} out, or start a new run" in error

    (text / "new.txt").write_text("more text")
    assert train("--resume", run) == 2
    assert "has changed since the run" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_with_what_it_has(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tiny_flags(precision="bf16,fp8", lr=1e25, warmup=0)
    assert train(*flags, "--data", text, "--output-dir", tmp_path) == 1
    assert re.search(r"error: bf16: at step \d the loss is .* smaller --lr", capsys.readouterr().err)
    run = tmp_path / "run-1"
    assert 1 <= len(metrics(run, "bf16")) < 8
    assert (run / "loss.png").exists()


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name.startswith("fp8moe.demo.")]:
        if name != "fp8moe.demo.cli":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert train("--steps=1") == 2
    assert f"error: training needs {missing}: pip install 'fp8moe[demo]'" in capsys.readouterr().err
