"""The chart of a run: how fast everybody is against BF16, problem by problem.

`python -m fp8moe.bench.chart FOLDER ...` draws `bench.png` of the `bench.json` in each folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.product.task import PRODUCT

OURS, PEER, BF16 = "#d1495b", "#8d99a6", "#30638e"
FLOOR = "At the black line is the floor: the least time that the kernels' bytes and flops allow without cached weights."
TITLES = {task.name: task.title for task in (PRODUCT, LAYER)} | {"distributed": "MoE layer on several ranks"}
"""By what was measured."""
BAR_INCHES, PROBLEM_INCHES, FRAME_INCHES = 0.26, 0.45, 1.4
"""Heights of a bar, of what stands above the bars of a problem, and of the figure's title and axis."""


def draw(source: Path, target: Path) -> None:
    """Draw bars for each problem in the JSON of a run: BF16's time for forward and backward over everybody's.

    Variants with `main_grad` stand in the JSON alone.
    """
    document = json.loads(source.read_text())
    title = TITLES[document["what"]]
    problems = [
        (problem, [problem["bf16"], *(row for row in problem["variants"] if "main_grad" not in row["name"])])
        for problem in document["problems"]
    ]
    bars = [len(rows) for _, rows in problems]
    height = FRAME_INCHES + sum(PROBLEM_INCHES + BAR_INCHES * count for count in bars)
    figure = Figure((9, height), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(problems), sharex=True, squeeze=False, height_ratios=bars)[:, 0]
    for axes, (problem, rows) in zip(all_axes, problems, strict=True):
        _draw_problem(axes, problem, rows)
    all_axes[-1].set_xlabel("BF16's time / time: more is faster")
    environment = document["environment"]
    versions = [f"{name} {version}" for name, version in environment["packages"].items() if version]
    figure.suptitle(
        f"{title}, forward + backward: speed against BF16\n"
        f"{', '.join([environment['device'], *versions, document['date'][:10]])}\n"
        + (FLOOR if document["ceilings"]["fp8_tflop_s"] else ""),
        fontsize=11,
    )
    figure.savefig(target)


def _draw_problem(axes: Axes, problem: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    shape = problem["shape"]
    sizes = ", ".join(f"{letter} {size}" for letter, size in shape.items() if letter != "name")
    axes.set_title(f"{shape['name']}  {sizes}; {problem['routing']} routing".strip(), fontsize=10, loc="left")
    speeds = [row.get("speed_against_bf16", 0.0) for row in rows]
    bars = axes.barh(range(len(rows)), speeds, color=[_color(row) for row in rows])
    figures = ["failed" if "error" in row else f"{speed:.2f}" for row, speed in zip(rows, speeds, strict=True)]
    figures[0] = f"{rows[0]['both']['median_ms']:.3g} ms"
    axes.bar_label(bars, figures, padding=4, fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color=BF16, linewidth=1, linestyle="--")
    # In format 2 each variant has a floor of its own.
    floors = filter(None, [problem.get("floor_ms"), *(row.get("both_floor_ms") for row in rows)])
    if floor_ms := min(floors, default=None):
        axes.axvline(rows[0]["both"]["median_ms"] / floor_ms, color="black", linewidth=1.6)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: dict[str, Any]) -> str:
    takes_bf16 = not row["name"].startswith("BF16") and row.get("computed_by") == "BF16"
    return f"{row['name']} (takes BF16)" if takes_bf16 else str(row["name"])


def _color(row: dict[str, Any]) -> str:
    if row["name"].startswith("BF16") or row.get("computed_by") == "BF16":
        return BF16
    return OURS if row["name"].startswith("fp8moe") else PEER


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        draw(folder / "bench.json", folder / "bench.png")
