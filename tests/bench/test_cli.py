"""A whole run on the CPU, and the arguments that stop one before it starts."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe.bench import ceilings, cli, peers
from fp8moe.bench.cli import add_arguments, run
from tests.bench.support import BUDGET

TINY = ["--shape", "256,128,128,2"]


def bench(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(flags))


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CEILINGS_BUDGET", BUDGET)
    for name in ("OP_BUDGET", "KERNEL_BUDGET", "QUICK_OP_BUDGET", "QUICK_KERNEL_BUDGET"):
        monkeypatch.setattr(cli, name, BUDGET)


@pytest.fixture
def _no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda package: False)


@pytest.mark.usefixtures("_quickly", "_no_peers")
def test_a_run_prints_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert bench(*TINY, "--shape", "512,128,256,4", "--routing", "even,ragged", "--output", str(folder)) == 0

    printed = capsys.readouterr().out
    assert "they say nothing about a GPU" in printed
    assert "torchao is not installed" in printed
    assert "(512,128,256,4), even routing, 128 rows an expert" in printed
    assert "fp8moe auto" in printed
    assert "quantize_rows_and_tokens" in printed

    document = json.loads((folder / "bench.json").read_text())
    assert (document["format"], document["what"]) == (5, "op")
    assert document["environment"]["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert document["ceilings"]["copy_gb_s"] > 0
    assert [(problem["shape"]["m"], problem["routing"]) for problem in document["problems"]] == [
        (256, "even"), (256, "ragged"), (512, "even"), (512, "ragged"),
    ]  # fmt: skip
    for problem in document["problems"]:
        assert sum(problem["group_sizes"]) == problem["shape"]["m"]
        bf16_into_main_grad, fp8, *others = problem["variants"]
        assert bf16_into_main_grad["name"] == "BF16 main_grad"
        names = [f"fp8moe auto {name}" for name in ("weights kept", "main_grad", "cached")]
        assert [row["name"] for row in others] == names
        for row in others:
            assert row["sqnr_db"] == fp8["sqnr_db"]
            assert 0 < row["both"]["min_ms"] <= row["both"]["median_ms"] <= row["both"]["max_ms"]
        bf16_ms, fp8_ms = (row["both"]["median_ms"] for row in (problem["bf16"], fp8))
        assert fp8["speed_against_bf16"] == pytest.approx(bf16_ms / fp8_ms)
        assert fp8["sqnr_db"]["d_w"] > 26
        assert 0.4 < fp8["saved_against_bf16"] < 2
        assert len(problem["kernels"]) == 21
        assert all(kernel["timing"]["median_ms"] > 0 for kernel in problem["kernels"])

    chart = (folder / "bench.png").read_bytes()
    assert chart.startswith(b"\x89PNG")


@pytest.mark.usefixtures("_quickly", "_no_peers")
def test_a_run_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "256,4,128,128,4"]
    assert bench("--layer", *shape, "--routing", "uniform,skewed", "--output", str(tmp_path)) == 0

    printed = capsys.readouterr().out
    assert "(256,4,128,128,4), uniform routing, 256 rows an expert" in printed
    assert "d_topk_weights" in printed
    assert "Routing.from_topk" in printed
    assert "torchao" not in printed.split("measured ceilings")[1]
    assert "liger_kernel is not installed" in printed

    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["what"] == "layer"
    assert [(problem["shape"]["k"], problem["routing"]) for problem in document["problems"]] == [
        (4, "uniform"), (4, "skewed"),
    ]  # fmt: skip
    names = ["", " cached", " main_grad", " cached main_grad", " weights kept", " FP8 storage"]
    for problem in document["problems"]:
        assert sum(problem["group_sizes"]) == 256 * problem["shape"]["k"]
        into_main_grad, plain, *others = problem["variants"]
        assert into_main_grad["name"] == "BF16 eager main_grad"
        assert [row["name"] for row in (plain, *others)] == [f"fp8moe auto{name}" for name in names]
        assert all(row["both"]["median_ms"] > 0 and row["speed_against_bf16"] > 0 for row in problem["variants"])
        assert list(problem["bf16"]["sqnr_db"]) == ["out", "d_hidden", "d_topk_weights", "d_w_gate_up", "d_w_down"]
        assert others[-1]["saved_row_bytes"] < plain["saved_row_bytes"]
        assert len(problem["kernels"]) == 42
        assert all(kernel["timing"]["median_ms"] > 0 for kernel in problem["kernels"])
    assert (tmp_path / "bench.png").exists()


@pytest.mark.usefixtures("_quickly", "_no_peers")
def test_a_wrong_layer_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fp8moe.moe_forward

    def unweighted(hidden: Tensor, ids: Tensor, weights: Tensor, *rest: Tensor, **options: object) -> Tensor:
        return right(hidden, ids, weights * 0 + 0.5, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8moe, "moe_forward", unweighted)
    assert bench("--layer", "--shape", "256,2,128,128,4", "--no-kernels") == 1
    assert "fp8moe auto cached main_grad: WrongResultError: out is wrong: SQNR" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_quickly", "_no_peers")
def test_nothing_is_written_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench(*TINY, "--no-kernels", "--quick", "--backend", "emulated", "--token-tile", "default,128") == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert "fp8moe emulated cached" in printed
    assert "fp8moe emulated tiles of 128 cached" in printed
    assert "quantize_rows" not in printed


@pytest.mark.usefixtures("_quickly", "_no_peers")
def test_what_is_wrong_has_no_figures_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fp8moe.grouped_mm

    def twice(a: Tensor, b: Tensor, offs: Tensor, **options: object) -> Tensor:
        return 2 * right(a, b, offs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8moe, "grouped_mm", twice)
    assert bench(*TINY, "--no-kernels", "--output", str(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "fp8moe auto: WrongResultError: out is wrong: SQNR" in captured.out
    assert "Traceback" in captured.err
    _, *failures = json.loads((tmp_path / "bench.json").read_text())["problems"][0]["variants"]
    assert failures[0]["name"] == "fp8moe auto"
    assert all("speed_against_bf16" not in failure for failure in failures)
    assert (tmp_path / "bench.png").stat().st_size > 0


@pytest.mark.usefixtures("_quickly")
def test_a_peer_that_fails_is_told_and_fails_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> object:
        raise RuntimeError("[no] driver")

    monkeypatch.setattr(peers, "is_installed", lambda package: True)
    monkeypatch.setattr("importlib.import_module", broken)
    assert bench(*TINY, "--no-kernels") == 0
    printed = capsys.readouterr().out
    assert "torchao FP8: RuntimeError: [no] driver" in printed
    assert "failed (a peer)" in printed


@pytest.mark.usefixtures("_quickly", "_no_peers")
def test_a_run_of_what_has_a_name_and_sizes_that_fp8_pads(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--layer", "--only", "GPT") == 0
    printed = capsys.readouterr().out
    assert "gpt-oss, tiny (256,4,120,200,8), uniform routing" in printed
    assert "d_b_gate_up" in printed
    assert "failed" not in printed
    assert "fine-grained" not in printed
    assert bench("--shape", "200,104,72,3") == 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "triton,fast"], "'fast' is not one of auto, deepgemm, triton, emulated"),
        (["--routing", "odd"], "'odd' is not one of even, skewed, ragged, uniform, few"),
        (["--token-tile", "256,300"], "'300' is not one of default, 128, 256, 512"),
    ],
)
def test_bad_arguments(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(*flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "1,2,3"], "shape is '1,2,3'; it must be integers M,N,K,E"),
        (["--only", "mixtral"], "--only 'mixtral' is in no name of a default shape; they are 'tiny', 'tiny fine-"),
        (["--only", "tiny", "--shape", "1,2,3,4"], "--shape and --only are given"),
        (["--layer", "--shape", "256,128,128,2"], "shape is '256,128,128,2'; it must be integers T,k,H,I,E, such as"),
        (["--layer", "--shape", "256,3,128,128,2"], "k of shape 256,3,128,128,2 is 3; it must be at most E, 2"),
        (["--layer", "--routing", "ragged"], "--routing 'ragged' is not one of uniform, skewed"),
        (["--output", __file__], f"[Errno 17] File exists: '{__file__}'"),
        (["--backend", "deepgemm"], "--backend deepgemm cannot be used on cpu: No NVIDIA GPU"),
    ],
)
def test_arguments_that_cannot_be_met(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*flags) == 2
    assert f"fp8moe bench: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "flags"), [("rich", []), ("matplotlib", ["--output", "results"])])
def test_missing_extras_are_named(
    missing: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find_spec(name))
    assert bench(*TINY, *flags) == 2
    assert f"{missing} is not installed; pip install 'fp8moe[demo]'" in capsys.readouterr().err


def test_flags_need_neither_rich_nor_matplotlib() -> None:
    """`python -m fp8moe` imports the flags of every command."""
    code = (
        "import sys, argparse; sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from fp8moe.bench.cli import add_arguments; add_arguments(argparse.ArgumentParser())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
