"""The loss curves of a run, and the gap between them, as a picture."""

from collections.abc import Sequence
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fp8moe.demo.settings import Precision
from fp8moe.demo.summary import BASELINE, Records, summarize
from fp8moe.demo.training import StepRecord

_COLORS: dict[Precision, str] = {"fp8": "#d1495b", "bf16": "#30638e"}
_LABELS: dict[Precision, str] = {"fp8": "FP8", "bf16": "BF16"}
_UNIFORM = float(np.log(256))  # the loss of a model that knows nothing


def plot_losses(records: Records, title: str, subtitle: str, file: IO[bytes]) -> None:
    """Write a PNG: losses by step above, the gap to the BF16 baseline below if it was trained too.

    A precision without steps is left out; there must be one with steps.
    """
    curves = {precision: steps for precision, steps in records.items() if steps}
    compared = [precision for precision in curves if precision != BASELINE and BASELINE in curves]
    figure = Figure(figsize=(9, 6.2 if compared else 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if compared:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_gaps(below, curves, compared)
    else:
        above = below = figure.subplots()
    _draw_losses(above, curves)
    above.set_title(title, fontsize=13, fontweight="bold", loc="left", pad=36)
    above.annotate(
        subtitle, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=9, color="0.35"
    )
    below.set_xlabel("optimizer step")
    figure.savefig(file, format="png")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over about `window` steps around each step; at the start over fewer, on both sides alike."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    before = np.minimum(window // 2, index)
    after = np.minimum(before, index[::-1])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def _draw_losses(axes: Axes, curves: Records) -> None:
    axes.axhline(_UNIFORM, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        "uniform guess, ln 256", (1, _UNIFORM), xycoords=("axes fraction", "data"), xytext=(-4, -3),
        textcoords="offset points", ha="right", va="top", fontsize=8, color="0.45",
    )  # fmt: skip
    for precision, summary in summarize(curves).items():
        steps = curves[precision]
        x, losses = _series(steps)
        name, color, width = _LABELS[precision], _COLORS[precision], 2.2 if precision == BASELINE else 1.2
        zorder = 2.0 if precision == BASELINE else 2.1
        marker = "o" if precision == BASELINE else "D"
        smoothed = smooth(losses, _window(len(losses)))
        axes.plot(x, losses, color=color, linewidth=0.5, alpha=0.2)
        axes.plot(
            x,
            smoothed,
            color=color,
            linewidth=width,
            zorder=zorder,
            label=f"{name}, training: {summary.last_loss:.3f} at the end",
        )
        measured = [(step.step, step.val_loss) for step in steps if step.val_loss is not None]
        if measured:
            axes.plot(
                *zip(*measured, strict=True), color=color, linestyle="none", marker=marker,
                markersize=5.5, markerfacecolor="white", markeredgewidth=1.4,
                label=f"{name}, held-out text: {summary.val_loss:.3f}",
            )  # fmt: skip
    axes.set_ylabel("loss (nats per byte)")
    lowest = min(_series(steps)[1].min() for steps in curves.values())
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.97 * lowest, top=_UNIFORM * 1.06)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    _style(axes)


def _draw_gaps(axes: Axes, curves: Records, compared: Sequence[Precision]) -> None:
    _, baseline = _series(curves[BASELINE])
    bound = 0.1
    axes.axhline(0, color=_COLORS[BASELINE], linewidth=1.2)
    for precision in compared:
        x, losses = _series(curves[precision])
        common = min(len(losses), len(baseline))
        gap = 100 * (losses[:common] / baseline[:common] - 1)
        smoothed = smooth(gap, _window(common))
        axes.plot(x[:common], gap, color=_COLORS[precision], linewidth=0.5, alpha=0.3)
        axes.plot(x[:common], smoothed, color=_COLORS[precision], linewidth=1.4)
        bound = max(bound, float(np.quantile(np.abs(gap), 0.98)) * 1.3)
    axes.set_ylim(-bound, bound)
    axes.set_ylabel("FP8 over BF16")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g} %" if value else "0 %"))
    _style(axes)


def _style(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _series(steps: Sequence[StepRecord]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([step.step for step in steps]), np.array([step.loss for step in steps])


def _window(steps: int) -> int:
    return max(1, steps // 25)
