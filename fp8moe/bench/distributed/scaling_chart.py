"""The chart of one layer on more and more ranks, with as many tokens on each:
`python -m fp8moe.bench.distributed.scaling_chart CHART.png ONE.json TWO.json ...`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fp8moe.bench.chart import BF16, OURS, PEER
from fp8moe.bench.distributed.calibration import shape_of
from fp8moe.bench.distributed.ways import BF16_DISPATCH, FP8_DISPATCH, PLAIN, TOKENS_ONCE
from fp8moe.bench.shapes import Balance, Shape

LINES = {
    PLAIN: (BF16, "-"),
    TOKENS_ONCE: (BF16, "--"),
    BF16_DISPATCH: (OURS, "--"),
    FP8_DISPATCH: (OURS, "-"),
    f"{FP8_DISPATCH}, weights kept": (OURS, ":"),
}
"""Color and style of each way that is drawn."""
PANEL_INCHES = 3.6


def draw(sources: Sequence[Path], target: Path) -> None:
    """Draw the tokens that a GPU computes in a second, forward and backward, by the number of ranks: a panel for each
    layer with uniform routing that runs of several sizes have. Bars are the range of the repetitions.

    Raises:
        ValueError: there is no such layer.
    """
    documents = [json.loads(path.read_text()) for path in sources]
    panels = _panels(documents)
    if not panels:
        raise ValueError("no layer with uniform routing was measured on different numbers of ranks")
    figure = Figure((PANEL_INCHES * len(panels), 4.2), dpi=110, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (shape, problems) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, shape, problems)
    all_axes[0].set_ylabel("1000 tokens a second and GPU")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    environment = documents[0]["environment"]
    figure.suptitle(
        f"MoE layer, forward + backward, its experts on several ranks: {environment['device']}, "
        f"torch {environment['packages']['torch']}, {documents[0]['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(target)


def _panels(documents: Sequence[Mapping[str, Any]]) -> dict[Shape, dict[int, Mapping[str, Any]]]:
    """The problems of each layer, by the number of ranks, the fewest first."""
    found: dict[Shape, dict[int, Mapping[str, Any]]] = {}
    for document in sorted(documents, key=lambda document: int(document["ranks"])):
        for problem in document["problems"]:
            if problem["routing"] == Balance.UNIFORM.value and problem["bf16"]:
                found.setdefault(shape_of(problem), {})[document["ranks"]] = problem
    return {shape: problems for shape, problems in found.items() if len(problems) > 1}


def _draw_panel(axes: Axes, shape: Shape, problems: Mapping[int, Mapping[str, Any]]) -> None:
    for name, (color, style) in LINES.items():
        times = {
            ranks: row["both"]
            for ranks, problem in problems.items()
            for row in (problem["bf16"], *problem["variants"])
            if row["name"] == name and "both" in row
        }
        if not times:
            continue
        speeds, most, least = (
            [shape["T"] / time[which] for time in times.values()] for which in ("median_ms", "min_ms", "max_ms")
        )
        below, above = ([abs(speed - end) for speed, end in zip(speeds, ends, strict=True)] for ends in (least, most))
        axes.errorbar(
            list(times), speeds, [below, above], label=name, color=color, linestyle=style, marker="o", markersize=4,
            capsize=3,
        )  # fmt: skip
    sizes = ", ".join(map(str, shape.sizes))
    axes.set_title(f"{shape.name}\n({sizes})", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(problems), [str(ranks) for ranks in problems])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=PEER, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the JSON of runs; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fp8moe.bench.distributed.scaling_chart", description="Draw a layer on more and more ranks."
    )
    parser.add_argument("chart", type=Path, help="the image to write, such as scaling.png")
    parser.add_argument("runs", type=Path, nargs="+", help="distributed.json of `bench --distributed --output`")
    arguments = parser.parse_args(argv)
    try:
        draw(arguments.runs, arguments.chart)
    except (OSError, KeyError, ValueError) as error:
        print(f"fp8moe scaling_chart: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
