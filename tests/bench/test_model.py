"""Whole models: a run on the CPU, and what kernels are for."""

import argparse
import importlib
import importlib.util
import json
import pkgutil
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.table import Table
from torch import nn

from fp8moe import kernels
from fp8moe.bench import cli
from fp8moe.bench.cli import add_arguments, run
from fp8moe.bench.model import measure
from fp8moe.bench.model.kernels import Launch, busy_us, costliest, kind_of, launches_of_ops, shares
from fp8moe.bench.model.models import MODELS
from fp8moe.bench.tables import as_markdown


def bench(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(flags))


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "ROUNDS", 1)


def test_a_run_trains_with_both_kinds_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    flags = ["--model", "tiny", "--layers", "1", "--batch", "2", "--length", "16", "--quick", "--no-compile"]
    assert bench(*flags, "--output", str(tmp_path)) == 0
    assert "fp8moe, eager" in capsys.readouterr().out
    document = json.loads((tmp_path / "model.json").read_text())
    assert "| grouped_mm, eager |" in (tmp_path / "model.md").read_text()
    theirs, ours, keeping = document["results"]
    assert (theirs["experts"], ours["experts"]) == ("grouped_mm", "fp8moe")
    assert keeping["losses"] == ours["losses"]
    for result in (theirs, ours, keeping):
        assert result["losses"][1] < result["losses"][0]
        assert 0 < result["backward_ms"] < result["step_ms"]
        for name in ("backward", "step"):
            fastest, slowest = result[f"{name}_range_ms"]
            assert fastest <= result[f"{name}_ms"] <= slowest
        assert result["tokens_per_second"] == pytest.approx(32 / result["step_ms"] * 1e3)
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-2)


@pytest.mark.filterwarnings("default")  # dynamo warns as it traces PyTorch and transformers
def test_compiled_layers_share_one_graph_without_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    flags = ["--model", "tiny", "--layers", "2", "--batch", "1", "--length", "16", "--steps", "3"]
    assert bench(*flags, "--output", str(tmp_path)) == 0
    results = json.loads((tmp_path / "model.json").read_text())["results"]
    assert [result["compiled"] for result in results] == [False, True] * 3
    for eager, compiled in zip(results[::2], results[1::2], strict=True):
        assert (compiled["graph_breaks"], compiled["graphs"], eager["graphs"]) == (0, 1, 0)
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-2)
        assert compiled["losses"][1] < compiled["losses"][0]


@pytest.mark.parametrize("name", MODELS)
def test_each_model_has_the_width_of_its_name(name: str) -> None:
    pytest.importorskip("transformers")
    config = MODELS[name].config(layers=1)
    width = {"qwen3-30b-a3b": 2048, "mixtral-8x7b": 4096, "deepseek-v3-like": 7168, "gpt-oss-20b": 2880, "tiny": 128}
    assert (config.hidden_size, config.num_hidden_layers) == (width[name], 1)
    assert config.vocab_size % 128 == 0
    assert config.vocab_size < 2 * MODELS[name].vocabulary


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--model", "tiny", "--layer"], "--model has its own shapes"),
        (["--model", "tiny", "--shape", "1,2,3,4"], "--model has its own shapes"),
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert bench(*flags) == cli.BAD_ARGUMENTS
    assert error in capsys.readouterr().err


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    assert bench("--model", "tiny") == cli.BAD_ARGUMENTS
    assert "pip install 'fp8moe[hf]'" in capsys.readouterr().err


def test_kernels_are_told_apart_by_their_names() -> None:
    kinds = {
        "m_grouped_kernel": "experts: GEMMs of rows, FP8",
        "wgrad_kernel": "experts: wgrad, FP8",
        "quantize_weight_kernel": "experts: quantize weights",
        "quantize_swiglu_backward_hopper_kernel": "experts: activation and quantization",
        "quantize_activation_hopper_kernel": "experts: quantize activations",
        "void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<int>>>": "experts: GEMMs, BF16",
        "nvjet_tst_128x256_64x4": "matrix products",
        "triton_poi_fused_add_0": "compiled by PyTorch",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add>": "elementwise and reductions",
        "what nobody knows": "other",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_every_kernel_of_ours_is_told_apart() -> None:
    pytest.importorskip("triton")
    names = [
        name
        for module in pkgutil.walk_packages(kernels.__path__, "fp8moe.kernels.")
        for name in vars(importlib.import_module(module.name))
        if name.endswith("_kernel")
    ]
    assert "combine_kernel" in names
    assert [name for name in names if not kind_of(name).startswith("experts: ")] == []


def test_times_of_launches_add_up_and_overlaps_count_once() -> None:
    launches = [Launch("wgrad_kernel", 0, 2000), Launch("wgrad_kernel", 1000, 2000), Launch("fill", 5000, 1000)]
    assert busy_us(launches) == 4000
    wgrad, fill = shares(launches, steps=2)
    assert (wgrad.ms, wgrad.calls, fill.ms, fill.calls) == (2.0, 1.0, 0.5, 0.5)
    assert [share.name for share in costliest(launches, 2, ["fill"], 5)] == ["fill"]


def test_kernels_are_listed_with_the_ops_that_launch_them() -> None:
    def event(name: str, parent: object, shapes: list[list[int]], *kernels: str) -> SimpleNamespace:
        launched = [SimpleNamespace(name=kernel, duration=1500.0) for kernel in kernels]
        return SimpleNamespace(name=name, cpu_parent=parent, input_shapes=shapes, kernels=launched)

    node = event("autograd::engine::evaluate_function: ToCopyBackward0", None, [])
    backward = event("ToCopyBackward0", node, [[8]])
    copy = event("aten::copy_", backward, [[8], [8], []], "copy_kernel", "copy_kernel")
    launch = event("cudaLaunchKernel", copy, [], "copy_kernel")
    clone = event("aten::clone", None, [], "copy_kernel")
    twice, once = costliest(launches_of_ops([node, backward, copy, launch, clone]), 1, ["copies and casts"], 15)
    assert (twice.op, twice.calls, twice.ms) == ("aten::copy_ [[8], [8]] < ToCopyBackward0", 2, 3.0)
    assert (once.op, once.calls, once.ms) == ("aten::clone", 1, 1.5)


def test_a_table_becomes_markdown() -> None:
    table = Table("a\nb", "c", title="of two")
    table.add_row("1", "x|y")
    assert as_markdown(table).splitlines() == ["**of two**", "", "| a b | c |", "| --- | --- |", r"| 1 | x\|y |"]
