"""From shapes to a model that AUTO reads."""

import argparse
import ast
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8moe
from fp8moe.__main__ import main
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.problem import Op
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Shape, layer_shape, product_shape
from fp8moe.bench.timing import HostStopwatch, Region
from fp8moe.bench.tune import cli, grid, report
from fp8moe.bench.tune.fit import fit_cost, fit_model
from fp8moe.bench.tune.grid import Case
from fp8moe.bench.tune.loss import LAYERS, PRODUCTS, Loss, measure_loss, near_break_even
from fp8moe.bench.tune.measure import ALWAYS_BF16, Sample, measure_case
from fp8moe.gemm import tuning
from fp8moe.gemm.cost import H200, Cost, CostModel, Costs, OpSize
from fp8moe.gemm.tuning import decided_by, deciding_model, read_models, write_model
from tests.bench.support import BUDGET, CPU

MODEL = CostModel(
    device=H200,
    measured="by nobody",
    product=Costs(
        bf16=Cost(37.99, 1.198e-06, 1.702e-06, 6.787e-09, host=200.0),
        fp8=Cost(44.51, 1.56e-06, 2.396e-06, 4.766e-09, host=1300.0),
        fp8_cached=Cost(44.51, 1.56e-06, 9.33e-07, 4.766e-09, host=1150.0),
    ),
    layer=Costs(
        bf16=Cost(75.98, 3.9e-06, 1.702e-06, 6.787e-09, host=1000.0),
        fp8=Cost(89.02, 2.55e-06, 2.396e-06, 4.766e-09, host=2300.0),
        fp8_cached=Cost(89.02, 2.55e-06, 9.33e-07, 4.766e-09, host=2200.0),
    ),
)


def predicted(case: Case, model: CostModel = MODEL, noise: float = 0.0) -> Sample:
    """A sample as the model has it, each time off by up to the share `noise`."""
    layer, work = case.task is LAYER, case.work
    costs = model.costs(layer)
    factors = (1 + noise * (2 * torch.rand(3) - 1)).tolist()
    bf16_us, fp8_us, fp8_cached_us = (
        cost.predict_device_us(work) * factor for cost, factor in zip(each(costs), factors, strict=True)
    )
    host_us = costs.bf16.host, costs.fp8.host, costs.fp8_cached.host
    return Sample(case.shape.title, layer, work, bf16_us, fp8_us, fp8_cached_us, host_us)


def each(costs: Costs) -> tuple[Cost, Cost, Cost]:
    return costs.bf16, costs.fp8, costs.fp8_cached


SAMPLES = [predicted(case) for case in grid.cases(quick=False)]


def test_the_grid_covers_both_sides_of_the_choice() -> None:
    products = [sample for sample in SAMPLES if not sample.layer]
    assert len(products) > 90
    assert len(SAMPLES) - len(products) == 12
    for layer in (False, True):
        pays = [sample.fp8_us < sample.bf16_us for sample in SAMPLES if sample.layer is layer]
        assert {True, False} == set(pays)
    quick = [predicted(case) for case in grid.cases(quick=True)]
    assert len(quick) < 0.6 * len(SAMPLES)
    assert sum(sample.layer for sample in quick) >= 6  # fewer say little about four coefficients
    assert sum(sample.bf16_us + sample.fp8_us + sample.fp8_cached_us for sample in SAMPLES) * 40 < 60e6


def test_the_fit_recovers_what_the_times_come_from() -> None:
    model = fit_model(SAMPLES, H200, "")
    for layer in (False, True):
        for found, true in zip(each(model.costs(layer)), each(MODEL.costs(layer)), strict=True):
            assert found.coefficients == pytest.approx(true.coefficients, rel=2e-3)


def test_the_fit_stands_noise() -> None:
    noisy = [predicted(case, noise=0.05) for case in grid.cases(quick=False)]
    model = fit_model(noisy, H200, "")
    for layer in (False, True):
        for found, true in zip(each(model.costs(layer)), each(MODEL.costs(layer)), strict=True):
            assert found.multiply_add == pytest.approx(true.multiply_add, rel=0.15)
            for sample in SAMPLES:
                if sample.layer is layer:
                    assert found.predict_us(sample.work) == pytest.approx(true.predict_us(sample.work), rel=0.1)
    assert max(verdict.loss for verdict in report.verdicts(SAMPLES, model, model)) < 0.06


@pytest.mark.parametrize("true", [Cost(40, 0, 2e-6, 0), Cost(0, 1e-6, 0, 5e-9), Cost(30, 0, 0, 0)])
def test_coefficients_that_are_0_are_found_to_be(true: Cost) -> None:
    works = [sample.work for sample in SAMPLES]
    assert fit_cost(works, [true.predict_us(work) for work in works]) == true
    assert fit_cost(works, [true.predict_us(work) for work in works], 1234.567) == replace(true, host=1235)


def test_no_coefficient_is_ever_negative() -> None:
    works = [sample.work for sample in SAMPLES]
    for _ in range(20):  # Cost itself refuses
        fit_cost(works, (torch.rand(len(works)) * 1000 + 1).tolist())
    falling = [1e4 / (1 + work.multiply_adds) ** 0.3 for work in works]
    assert fit_cost(works, falling).multiply_add == 0


def test_the_hosts_time_is_the_median_of_each_way_and_kind() -> None:
    hosts = [(1.0, 20.0, 300.0), None, (3.0, 10.0, 200.0), (2.0, 30.0, 900.0)]
    products = [replace(sample, host_us=host_us) for sample, host_us in zip(SAMPLES, hosts, strict=False)]
    model = fit_model(products * 2 + [sample for sample in SAMPLES if sample.layer], H200, "")
    assert [cost.host for cost in each(model.product)] == [2, 20, 300]
    assert [cost.host for cost in each(model.layer)] == [1000, 2300, 2200]


@pytest.mark.parametrize("quick", [False, True])
def test_the_host_is_measured_where_rows_are_few(quick: bool) -> None:
    cases = grid.cases(quick)
    chosen = [case for case, with_host in zip(cases, grid.with_host(cases), strict=True) if with_host]
    assert {case.task.name for case in chosen} == {"op", "layer"}
    for case in chosen:
        others = [other.work for other in cases if other.task is case.task]
        alike = [work.multiply_adds for work in others if work.weights == case.work.weights]
        assert case.work.multiply_adds == min(alike)
    assert sum(MODEL.costs(case.task is LAYER).fp8.predict_us(case.work) for case in chosen) * 150 < 10e6


def test_a_verdict_knows_its_loss() -> None:
    sample = Sample("s", False, OpSize(1, 1, 1), bf16_us=100, fp8_us=125, fp8_cached_us=50)
    free_to_launch = replace(MODEL, product=Costs(*(replace(cost, host=0.0) for cost in each(MODEL.product))))
    prefers_fp8 = Costs(bf16=Cost(2, 0, 0, 0), fp8=Cost(1, 0, 0, 0), fp8_cached=Cost(1, 0, 0, 0))
    found = report.verdicts([sample], replace(MODEL, product=prefers_fp8), free_to_launch)
    assert [(verdict.takes_fp8, verdict.loss) for verdict in found] == [(True, 0.25), (True, 0.0)]
    found = report.verdicts([sample], ALWAYS_BF16, free_to_launch)
    assert [(verdict.takes_fp8, verdict.loss) for verdict in found] == [(False, 0.0), (False, 1.0)]


def test_a_loss_counts_the_host_as_it_was_measured() -> None:
    sample = Sample("s", False, OpSize(1, 1, 1), bf16_us=100, fp8_us=125, fp8_cached_us=50)
    prefers_fp8 = Costs(bf16=Cost(2, 0, 0, 0, 9e9), fp8=Cost(1, 0, 0, 0), fp8_cached=Cost(1, 0, 0, 0))
    found = report.verdicts([sample], replace(MODEL, product=prefers_fp8), MODEL)
    assert [(verdict.takes_fp8, verdict.loss) for verdict in found] == [(True, 5.5), (True, 4.75)]
    assert [verdict.bf16_us for verdict in found] == [200, 200]


def test_a_gain_within_the_noise_is_not_taken() -> None:
    sample = Sample("s", False, OpSize(1, 1, 1), bf16_us=100, fp8_us=98, fp8_cached_us=96)
    costs = Costs(bf16=Cost(100, 0, 0, 0), fp8=Cost(98, 0, 0, 0), fp8_cached=Cost(96, 0, 0, 0))
    model = replace(MODEL, product=costs)
    found = report.verdicts([sample], model, model)
    assert [(verdict.takes_fp8, verdict.loss) for verdict in found] == [(False, pytest.approx(100 / 98 - 1)), (True, 0)]


@pytest.mark.parametrize(
    "case",
    [Case(PRODUCT, product_shape(200, 256, 128, 3)), Case(LAYER, layer_shape(128, 2, 128, 128, 4))],
    ids=["product", "layer"],
)
def test_each_way_is_captured_and_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[CostModel | None] = []
    launched: list[CostModel | None] = []

    def capture(region: Region) -> Region:
        ran.clear()
        region()
        asked.append(ran[-1] if ran else None)
        return region

    def launches(region: Region) -> float:
        ran.clear()
        region()
        launched.append(ran[-1] if ran else None)
        return 10.0 * len(launched)

    ran: list[CostModel] = []
    grouped_mm, moe_forward = fp8moe.grouped_mm, fp8moe.moe_forward

    def watched(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with_model = tuning._override
            ran.append(MODEL if with_model is None else with_model.model)
            return op(*arguments, **options)

        return run

    monkeypatch.setattr(fp8moe, "grouped_mm", watched(grouped_mm))
    monkeypatch.setattr(fp8moe, "moe_forward", watched(moe_forward))
    sample = measure_case(case, CPU, HostStopwatch(), BUDGET, launches, capture)
    assert asked == launched == [ALWAYS_BF16, MODEL, MODEL]
    assert sample.host_us == pytest.approx((10, 20, 30))
    assert measure_case(case, CPU, HostStopwatch(), BUDGET, None, capture).host_us is None
    assert sample.layer == (case.task is LAYER)
    assert sample.work == case.work
    assert min(sample.bf16_us, sample.fp8_us, sample.fp8_cached_us) > 0


def test_near_the_break_even_bf16_and_fp8_take_nearly_as_long() -> None:
    cases = grid.cases(quick=False)
    chosen = near_break_even(SAMPLES, cases, MODEL)
    assert [case.task for case in chosen] == [PRODUCT] * PRODUCTS + [LAYER] * LAYERS

    def difference(case: Case) -> float:
        costs = MODEL.costs(case.task is LAYER)
        return abs(math.log(costs.fp8.predict_us(case.work) / costs.bf16.predict_us(case.work)))

    for task in (PRODUCT, LAYER):
        far = [difference(case) for case in cases if case.task is task and case not in chosen]
        assert max(difference(case) for case in chosen if case.task is task) <= min(far)


@pytest.mark.parametrize(
    "case",
    [Case(PRODUCT, product_shape(200, 256, 128, 3)), Case(LAYER, layer_shape(128, 2, 128, 128, 4))],
    ids=["product", "layer"],
)
def test_auto_is_timed_beside_pytorch_by_the_new_model(case: Case) -> None:
    decided: list[bool] = []
    task = case.task

    def watched(shape: Shape) -> Op:
        op = task.eager(shape)

        def run(*arguments: Any) -> Any:
            decided.append(tuning._override is None)
            return op(*arguments)

        return run

    right = task.run(case.shape)

    def ours(*arguments: Any, **options: Any) -> Any:
        override = tuning._override
        decided.append(override is not None and override.model is MODEL)
        return right(*arguments, **options)

    watching = replace(task, eager=watched, run=lambda shape: ours)
    loss = measure_loss(Case(watching, case.shape), MODEL, CPU, HostStopwatch(), BUDGET)
    assert len(decided) > 6
    assert all(decided)
    assert loss.taken == "emulated"
    assert loss.ratio == pytest.approx(loss.auto_us / loss.pytorch_us)
    assert str(case.shape) in loss.title


def tune(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(flags))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tuned models are, on a machine with an H200 that takes as long as the shipped model says."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("FP8MOE_TUNING", str(path))
    monkeypatch.setattr(tuning, "device_name", lambda device: H200)
    monkeypatch.setattr(cli, "device_name", lambda device: H200)
    monkeypatch.setattr(cli, "device_to_tune", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(cli, "stopwatch_for", lambda device: HostStopwatch())
    monkeypatch.setattr(cli, "measure_case", lambda case, *_: predicted(case))
    monkeypatch.setattr(cli, "measure_loss", lambda case, *_: Loss(case.shape.title, "BF16", case.shape.sizes[0], 1000))
    monkeypatch.setattr(tuning, "_override", tuning.DecidingModel(ALWAYS_BF16, "old"))
    return path


def test_a_run_prints_and_writes_a_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(replace(MODEL, device="NVIDIA H20"), path)
    assert tune() == 0
    models = read_models(path)
    assert set(models) == {H200, "NVIDIA H20"}
    assert models[H200].product.fp8.multiply_add == pytest.approx(MODEL.product.fp8.multiply_add, rel=1e-3)
    assert "products, 12 layers" in models[H200].measured
    assert f"torch {torch.__version__}" in models[H200].measured
    printed = capsys.readouterr().out
    assert "32768,4096,7168,8" in printed
    assert ", cached" in printed
    assert re.search(r"AUTO by this model takes at most [0-3]\.\d% longer", printed)
    assert "AUTO as it was   takes at most" in printed
    assert not re.search(r"AUTO as it was   takes at most \d\.\d%", printed)
    worst = re.search(r"AUTO takes at most (\d+\.\d\d) of eager PyTorch's time near its break-even: \((\d+),", printed)
    assert worst is not None
    assert float(worst[1]) == pytest.approx(int(worst[2]) / 1000, abs=0.01)
    assert "host=1300.0" in printed
    expression = ast.parse(printed[printed.index("CostModel(") : printed.index("\n\nwritten to")], mode="eval")
    names = {"CostModel": CostModel, "Costs": Costs, "Cost": Cost}
    assert eval(compile(expression, "", "eval"), names) == models[H200]  # it can be pasted
    assert f"written to {path}\n" in printed


def test_a_dry_run_writes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--dry-run", "--quick") == 0
    assert not path.exists()
    assert "CostModel(" in capsys.readouterr().out


def test_another_file_is_told_to_need_the_variable(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    assert tune("--quick", "--output", str(other)) == 0
    assert set(read_models(other)) == {H200}
    assert not path.exists()
    assert f"AUTO reads it with FP8MOE_TUNING={other}" in capsys.readouterr().out


def test_a_shape_that_fails_stops_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_or_fail(case: Case, *_: object) -> Sample:
        if case.shape.title == "(4096,2048,2048,8)":
            raise RuntimeError("it waits")
        return predicted(case)

    monkeypatch.setattr(cli, "measure_case", measure_or_fail)
    with pytest.raises(RuntimeError, match="it waits") as stopped:
        tune("--quick")
    assert stopped.value.__notes__ == ["while Grouped matrix product (4096,2048,2048,8) was measured"]
    assert not path.exists()


def test_a_broken_file_stops_a_run_before_it_starts(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "measure_all", lambda *_: pytest.fail("it measures"))
    path.parent.mkdir()
    path.write_text("{")
    assert tune() == 2
    assert f"fp8moe tune: error: {path} cannot be used" in capsys.readouterr().err
    assert path.read_text() == "{"


def test_what_cannot_be_written_is_told(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cli, "write_model", full)
    assert tune("--quick") == 1
    assert "cannot be written (no space left); name another with --output" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "fp8moe tune: error: torch sees no CUDA GPU" in capsys.readouterr().err


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "explain", lambda device, config: fp8moe.explain("cpu", config))
    with pytest.raises(ValueError, match=r"no FP8 backend can run on cpu: AUTO takes BF16 there\. No NVIDIA GPU"):
        cli.device_to_tune()


def test_held_to_bf16_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with decided_by(ALWAYS_BF16):
        costs = deciding_model(torch.device("cuda:0")).model.product
    assert costs.bf16.predict_us(OpSize(9, 9, 9)) < costs.fp8.predict_us(OpSize(0, 0, 0))
