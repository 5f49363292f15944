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
from fp8moe.config import TOKEN_TILES

OURS, PEER, BF16 = "#d1495b", "#8d99a6", "#30638e"
INK, PALE = "0.2", "0.45"
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1}
LABELS = {
    "fp8moe auto": "AUTO",
    "fp8moe auto cached": "AUTO, cached weights",
    **{f"fp8moe auto tiles of {tile}": f"AUTO, tiles of {tile}" for tile in TOKEN_TILES[1:]},
    **{f"fp8moe auto tiles of {tile} cached": f"AUTO, tiles of {tile}, cached weights" for tile in TOKEN_TILES[1:]},
    "fp8moe auto FP8 storage": "AUTO, FP8 storage",
    "fp8moe deepgemm": "DeepGEMM",
    "fp8moe triton": "Triton",
    "fp8moe emulated": "emulation",
}
"""The variants of `fp8moe` that are drawn, of token tiles the longest; the JSON has them all."""
NARROW = 0.2
"""Up to this speed a bar is too short for the figure in it."""
BAR_INCHES = 0.26
HEADING_BARS = 1.6
"""Height of what stands above the bars of a problem, in bars."""
FRAME_INCHES = 1.7
"""Height of title and axis."""


def draw(source: Path, target: Path) -> None:
    """Draw bars for each problem in the JSON of a run: BF16's time for forward and backward over everybody's."""
    document = json.loads(source.read_text())
    task = next(task for task in (PRODUCT, LAYER) if task.name == document["what"])
    problems = [(problem, _rows(problem)) for problem in document["problems"]]
    height = sum(len(rows) + HEADING_BARS for _, rows in problems)
    figure = Figure((9, FRAME_INCHES + BAR_INCHES * height), dpi=150, layout="constrained")
    axes = figure.subplots()
    top, ticks = 0.0, dict[float, str]()
    for problem, rows in problems:
        _draw_heading(axes, problem, task.shapes_on_cuda[0].letters, top)
        top += HEADING_BARS
        for number, variant in enumerate(rows):
            ticks[top + number] = _label(variant)
            _draw_bar(axes, variant, top + number)
        _draw_floor(axes, rows, top)
        top += len(rows)
    axes.axvline(1, color=BF16, linewidth=1, linestyle=(0, (4, 3)), zorder=0.9)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    axes.set_ylim(height - 0.2, 0)
    axes.set_xlim(0, 1.08 * axes.dataLim.x1)
    axes.set_xlabel("BF16's time / time: more is faster")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{task.title}, forward + backward: speed against BF16", fontsize=12, fontweight="bold", loc="left", pad=36
    )
    axes.annotate(
        f"{_where(document)}\nAt the black line is the floor: the least time that the kernels' bytes and flops allow.",
        (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=9, color=PALE,
    )  # fmt: skip
    figure.savefig(target)


def _rows(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of a problem: BF16, peers, and the variants in `LABELS`."""
    names = " ".join(variant["name"] for variant in problem["variants"])
    shorter = [f"tiles of {tile}" for tile in TOKEN_TILES if f"tiles of {2 * tile}" in names]
    peers = [variant for variant in problem["variants"] if not variant["name"].startswith("fp8moe")]
    ours = [variant for variant in problem["variants"] if variant["name"] in LABELS]
    return [problem["bf16"], *peers, *(row for row in ours if not any(tiles in row["name"] for tiles in shorter))]


def _draw_heading(axes: Axes, problem: dict[str, Any], letters: str, top: float) -> None:
    sizes = ", ".join(f"{letter} {problem['shape'][letter.lower()]}" for letter in letters)
    y = top + 0.75 * (HEADING_BARS - 0.5)
    name = axes.annotate(
        problem["shape"]["name"], (0, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=10,
        fontweight="bold", color=INK, bbox=BACKGROUND,
    )  # fmt: skip
    axes.annotate(
        f"{sizes}; {problem['routing']} routing", (1, 0.5), xycoords=name, xytext=(6, 0), textcoords="offset points",
        va="center", fontsize=9, color=PALE, bbox=BACKGROUND,
    )  # fmt: skip


def _label(variant: dict[str, Any]) -> str:
    label = LABELS.get(variant["name"], variant["name"])
    return f"{label} (takes BF16)" if variant.get("computed_by") == "BF16" else label


def _draw_bar(axes: Axes, variant: dict[str, Any], y: float) -> None:
    if "error" in variant:
        axes.text(0.02, y, "failed", va="center", fontsize=9, color=OURS)
        return
    is_baseline, speed = variant["name"] == "BF16", variant["speed_against_bf16"]
    color = BF16 if is_baseline or variant["computed_by"] == "BF16" else OURS if variant["name"] in LABELS else PEER
    axes.barh(y, speed, height=0.8, color=color)
    fits = speed > NARROW
    axes.annotate(
        f"{variant['both']['median_ms']:.3g} ms" if is_baseline else f"{speed:.2f}", (speed, y),
        xytext=(-5 if fits else 5, 0), textcoords="offset points", ha="right" if fits else "left", va="center",
        fontsize=9, fontweight="bold", color="white" if fits else INK,
    )  # fmt: skip


def _draw_floor(axes: Axes, rows: list[dict[str, Any]], top: float) -> None:
    bf16_ms = rows[0]["both"]["median_ms"]
    floors = [bf16_ms / row["both_floor_ms"] for row in rows if row.get("both_floor_ms")]
    if floors:
        axes.vlines(max(floors), top - 0.45, top + len(rows) - 0.55, color="black", linewidth=1.6)


def _where(document: dict[str, Any]) -> str:
    environment = document["environment"]
    versions = [
        f"{name} {environment['packages'][name]}"
        for name in ("torch", "triton", "torchao")
        if environment["packages"][name]
    ]
    return ", ".join([environment["device"], *versions, document["dtype"], document["date"][:10]])


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        draw(folder / "bench.json", folder / "bench.png")
