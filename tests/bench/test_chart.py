"""The chart of problems that do not have the same variants."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fp8moe.bench.chart import draw


def variant(name: str, speed: float, computed_by: str = "triton") -> dict[str, Any]:
    return {
        "name": name,
        "computed_by": computed_by,
        "speed_against_bf16": speed,
        "both": {"median_ms": 3 / speed},
    }


def problem(*variants: dict[str, Any]) -> dict[str, Any]:
    shape = {"t": 8, "k": 2, "h": 128, "i": 128, "e": 2, "name": "a model"}
    return {"shape": shape, "routing": "uniform", "bf16": variant("BF16", 1, "torch"), "variants": list(variants)}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The chart of three problems: one with more than is drawn, one where AUTO is BF16, one that failed."""
    whole = problem(
        variant("Liger BF16", 0.8), variant("fp8moe auto", 1.5), variant("fp8moe auto main_grad", 1.4),
        variant("fp8moe auto cached", 1.75),
    )  # fmt: skip
    failure = {"name": "fp8moe auto", "is_ours": True, "error": "no"}
    document = {
        "what": "layer",
        "dtype": "bf16",
        "date": "2000-01-01T00:00",
        "environment": {"device": "a GPU", "packages": {"torch": "2", "triton": "3", "torchao": None}},
        "problems": [whole, problem(variant("fp8moe auto", 0.99, "BF16")), problem(failure)],
    }
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", remember)
    (tmp_path / "bench.json").write_text(json.dumps(document))
    draw(tmp_path / "bench.json", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def bars_of(axes: Axes) -> list[Rectangle]:
    return [bar for bar in axes.patches if isinstance(bar, Rectangle)]


def test_each_bar_has_its_name_and_its_length(drawn: Figure) -> None:
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in drawn.axes] == [
        ["BF16", "Liger BF16", "fp8moe auto", "fp8moe auto cached"],
        ["BF16", "fp8moe auto (takes BF16)"],
        ["BF16", "fp8moe auto"],
    ]
    assert [[bar.get_width() for bar in bars_of(axes)] for axes in drawn.axes] == [
        [1, 0.8, 1.5, 1.75], [1, 0.99], [1, 0],
    ]  # fmt: skip
    assert [[text.get_text() for text in axes.texts] for axes in drawn.axes] == [
        ["3 ms", "0.80", "1.50", "1.75"], ["3 ms", "0.99"], ["3 ms", "failed"],
    ]  # fmt: skip
    assert drawn.axes[0].get_title("left") == "a model  t 8, k 2, h 128, i 128, e 2; uniform routing"


def test_colors_tell_bf16_from_fp8_from_peers(drawn: Figure) -> None:
    bf16, peer, auto, cached = (bar.get_facecolor() for bar in bars_of(drawn.axes[0]))
    _, auto_in_bf16 = (bar.get_facecolor() for bar in bars_of(drawn.axes[1]))
    assert bf16 == auto_in_bf16
    assert auto == cached
    assert len({bf16, peer, auto}) == 3
