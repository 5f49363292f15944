"""The chart of problems that do not have the same variants."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from fp8moe.bench.chart import draw
from fp8moe.bench.layer.shapes import LayerShape, TopkRouting
from fp8moe.bench.layer.task import LayerTask
from fp8moe.bench.ops import Failure
from fp8moe.bench.record import Report, environment_of
from fp8moe.bench.session import ProblemResult, measure_problem
from fp8moe.bench.task import What
from fp8moe.gemm.explain import explain
from tests.bench.support import CPU, small_lab


def result() -> ProblemResult:
    task = LayerTask(LayerShape(256, 2, 128, 128, 2), TopkRouting.UNIFORM)
    return measure_problem(task, task.variants([partial(explain, CPU)]), None, torch.bfloat16, 0, small_lab())


def test_a_problem_without_a_variant_has_no_bar_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = result()
    alone = replace(whole, shape=LayerShape(128, 2, 128, 128, 2), variants=whole.variants[:1])
    broken = replace(whole, shape=LayerShape(384, 2, 128, 128, 2), variants=[Failure("fp8moe auto", True, "no")])
    lab = small_lab()
    report = Report(
        What.LAYER, "", "2000-01-01", 0, "bf16", environment_of(CPU), lab.ceilings, problems=[whole, alone, broken]
    )
    drawn: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, path: Path) -> None:
        drawn.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", remember)
    draw(report, tmp_path / "chart.png")
    (panel,) = drawn[0].axes
    assert len(panel.patches) == len(whole.variants) + 1
    assert len({patch.get_facecolor() for patch in panel.patches}) == len(whole.variants)
    assert "fp8moe auto failed" in [text.get_text() for text in panel.texts]
