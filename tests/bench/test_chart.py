"""The chart of problems that do not have the same variants."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fp8moe.bench.chart import draw

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def variant(name: str, speed: float, computed_by: str = "triton") -> dict[str, Any]:
    return {
        "name": name,
        "computed_by": computed_by,
        "speed_against_bf16": speed,
        "both": {"median_ms": 3 / speed},
    }


def problem(*variants: dict[str, Any]) -> dict[str, Any]:
    shape = {"t": 8, "k": 2, "h": 128, "i": 128, "e": 2, "name": "a model"}
    bf16 = variant("BF16", 1, "torch")
    return {"shape": shape, "routing": "uniform", "bf16": bf16, "variants": list(variants)}


@pytest.fixture
def drawn(tmp_path: Path, figures: list[Figure]) -> Figure:
    """The chart of three problems: with more than is drawn, with AUTO in BF16, and of format 2 with a failure."""
    whole = problem(
        variant("Liger BF16", 0.8), variant("fp8moe auto", 1.5), variant("fp8moe auto main_grad", 1.4),
        variant("fp8moe auto cached", 1.75),
    )  # fmt: skip
    whole["floor_ms"] = 1.5
    in_bf16 = problem(variant("BF16 eager", 0.7, "torch"), variant("fp8moe auto", 0.99, "BF16"))
    in_bf16["floor_ms"] = None
    failure = {"name": "fp8moe auto", "is_ours": True, "error": "no"}
    of_format_2 = problem(failure, variant("fp8moe triton", 1.2) | {"both_floor_ms": 2.4})
    of_format_2["bf16"]["both_floor_ms"] = 2.8
    document = {
        "what": "layer",
        "dtype": "bf16",
        "date": "2000-01-01T00:00",
        "ceilings": {"fp8_tflop_s": 1000},
        "environment": {"device": "a GPU", "packages": {"torch": "2", "triton": "3", "torchao": None}},
        "problems": [whole, in_bf16, of_format_2],
    }
    (tmp_path / "bench.json").write_text(json.dumps(document))
    draw(tmp_path / "bench.json", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def bars_of(axes: Axes) -> list[Rectangle]:
    return [bar for bar in axes.patches if isinstance(bar, Rectangle)]


def test_each_bar_has_its_name_and_its_length(drawn: Figure) -> None:
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in drawn.axes] == [
        ["BF16", "Liger BF16", "fp8moe auto", "fp8moe auto cached"],
        ["BF16", "BF16 eager", "fp8moe auto (takes BF16)"],
        ["BF16", "fp8moe auto", "fp8moe triton"],
    ]
    assert [[bar.get_width() for bar in bars_of(axes)] for axes in drawn.axes] == [
        [1, 0.8, 1.5, 1.75], [1, 0.7, 0.99], [1, 0, 1.2],
    ]  # fmt: skip
    assert [[text.get_text() for text in axes.texts] for axes in drawn.axes] == [
        ["3 ms", "0.80", "1.50", "1.75"], ["3 ms", "0.70", "0.99"], ["3 ms", "failed", "1.20"],
    ]  # fmt: skip
    assert drawn.axes[0].get_title("left") == "a model  t 8, k 2, h 128, i 128, e 2; uniform routing"


def test_colors_tell_bf16_from_fp8_from_peers(drawn: Figure) -> None:
    bf16, peer, auto, cached = (bar.get_facecolor() for bar in bars_of(drawn.axes[0]))
    _, eager, auto_in_bf16 = (bar.get_facecolor() for bar in bars_of(drawn.axes[1]))
    assert bf16 == eager == auto_in_bf16
    assert auto == cached
    assert len({bf16, peer, auto}) == 3


def test_the_floor_is_a_black_line(drawn: Figure) -> None:
    at = [[line.get_xdata()[0] for line in axes.lines if line.get_color() == "black"] for axes in drawn.axes]  # type: ignore[index]
    assert at == [[3 / 1.5], [], [3 / 2.4]]
    assert "At the black line is the floor" in drawn.get_suptitle()


@pytest.mark.parametrize("results", sorted(RESULTS.glob("*/bench.json")), ids=lambda path: path.parent.name)
def test_results_that_were_kept_can_still_be_drawn(results: Path, tmp_path: Path) -> None:
    draw(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
