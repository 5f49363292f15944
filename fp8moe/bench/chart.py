"""The chart: how fast everybody is against BF16, shape by shape."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fp8moe.bench.ops import Failure
from fp8moe.bench.peers import TORCHAO
from fp8moe.bench.record import Report
from fp8moe.bench.session import ProblemResult
from fp8moe.bench.shapes import AnyShape

BAR_INCHES = 0.26
GAP_INCHES = 0.3
"""Between two shapes."""
LABELS_INCHES, PANEL_INCHES, WIDE_PANEL_INCHES = 2.8, 4.0, 7.2
"""Widths: of the shapes' names, of one routing of several, of a single one."""
FRAME_INCHES = 2.2
"""Height of titles, axis and legend."""
MARGIN_INCHES = 0.12
LETTER_INCHES, SWATCH_INCHES = 0.085, 0.6
"""Widths in the legend."""
COLORS = {
    TORCHAO: "#a3a9b1",
    "fp8moe auto": "#1d4f91",
    "fp8moe triton": "#2f7d6b",
    "fp8moe deepgemm": "#2f86c9",
    "fp8moe emulated": "#a37a1f",
}
"""Of names; the more options follow after it, the lighter."""
LIGHTEST = 0.75
"""The share of white in the color of a name with the last of its options."""
INK = "#333333"

Color = tuple[float, float, float]


def draw(report: Report, path: Path) -> None:
    """Draw a panel for each routing, in it a group of bars for each shape: BF16's time over each variant's.

    Times are of forward and backward together.
    """
    names = list(dict.fromkeys(variant.name for problem in report.problems for variant in problem.variants))
    colors = _colors(names)
    routings = list(dict.fromkeys(problem.routing for problem in report.problems))
    shapes = list(dict.fromkeys(problem.shape for problem in report.problems))
    group_inches = len(names) * BAR_INCHES + GAP_INCHES
    tops = {shape: index * group_inches for index, shape in enumerate(shapes)}

    panels_inches = WIDE_PANEL_INCHES if len(routings) == 1 else PANEL_INCHES * len(routings)
    size = LABELS_INCHES + panels_inches, FRAME_INCHES + group_inches * len(shapes)
    layout = ConstrainedLayoutEngine(w_pad=MARGIN_INCHES, h_pad=MARGIN_INCHES)
    figure = Figure(size, layout=layout, dpi=150)
    panels = figure.subplots(1, len(routings), sharex=True, sharey=True, squeeze=False)[0]
    baseline = f"BF16 ({report.problems[0].bf16.computed_by})"
    for panel, routing in zip(panels, routings, strict=True):
        for problem in report.problems:
            if problem.routing is routing:
                _draw_problem(panel, problem, colors, tops[problem.shape])
        panel.axvline(1.0, color=INK, linewidth=1.2, linestyle="--", label=baseline)
        panel.set_title(f"{routing.value} routing", loc="left", fontsize=10, color=INK)
        panel.set_xlabel("BF16's time / time: more is better", color=INK)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", color="#e4e4e4")
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)

    middle = (len(names) - 1) * BAR_INCHES / 2
    first = panels[0]
    first.set_yticks([tops[shape] + middle for shape in shapes], [_label(shape) for shape in shapes])
    first.set_ylim(len(shapes) * group_inches - (BAR_INCHES + GAP_INCHES) / 2, -(BAR_INCHES + GAP_INCHES) / 2)
    first.margins(x=0.08)
    first.set_xlim(left=0)
    figure.suptitle(f"{report.what.title}, forward + backward: speed against BF16", fontweight="bold", color=INK)
    legend = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)  # one entry a label
    }
    order = [*(name for name in names if name in legend), *(label for label in legend if label not in names)]
    handles = [legend[label] for label in order]
    columns = int(size[0] // (LETTER_INCHES * max(map(len, order)) + SWATCH_INCHES)) or 1
    figure.legend(handles, order, title=_where(report), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)


def _draw_problem(panel: Axes, problem: ProblemResult, colors: dict[str, Color], top: float) -> None:
    variants = {variant.name: variant for variant in problem.variants}
    for position, (name, color) in enumerate(colors.items()):
        y = top + position * BAR_INCHES
        variant = variants.get(name)
        if variant is None:  # where AUTO is BF16 there is but one row for it
            continue
        if isinstance(variant, Failure):
            panel.text(0.02, y, f"{name} failed", va="center", fontsize=8, color="#b03030")
            continue
        speed = problem.speed(variant)
        bar = panel.barh(y, speed, height=0.86 * BAR_INCHES, color=color, label=name)
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        panel.bar_label(bar, fmt="%.2f", padding=4, fontsize=8, color=INK, bbox=background)
    floors = [
        problem.bf16.both.median_ms / variant.both_floor_ms for variant in problem.measured if variant.both_floor_ms
    ]
    if floors:
        half = BAR_INCHES / 2
        ends = top - half, top + (len(colors) - 1) * BAR_INCHES + half
        panel.vlines(max(floors), *ends, color="#c0392b", linewidth=1.5, label="floor: none can be faster")


def _colors(names: list[str]) -> dict[str, Color]:
    """Of each name."""
    families: dict[str, list[str]] = {plain: [] for plain in COLORS}
    for name in names:
        families[next(plain for plain in COLORS if name == plain or name.startswith(f"{plain} "))].append(name)
    colors = {}
    for plain, family in families.items():
        for number, name in enumerate(family):
            white = LIGHTEST * number / max(len(family) - 1, 1)
            red, green, blue = (white + (1 - white) * share for share in to_rgb(COLORS[plain]))
            colors[name] = red, green, blue
    return {name: colors[name] for name in names}


def _label(shape: AnyShape) -> str:
    *sizes_but_experts, (_, experts) = shape.sizes.items()
    sizes = ", ".join([*(f"{letter} {size}" for letter, size in sizes_but_experts), f"{experts} experts"])
    return "\n".join(line for line in (shape.name, sizes) if line)


def _where(report: Report) -> str:
    packages = report.environment.packages
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "torchao") if packages[name])
    return f"{report.environment.device}, {versions}, {report.dtype}, {report.date[:10]}"
