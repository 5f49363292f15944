"""The loss curves of a run, and the gap between them, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fp8moe.demo.settings import Precision
from fp8moe.demo.training import StepRecord

# The curves almost coincide: FP8 is drawn thin over a wide BF16.
_WIDTHS: dict[Precision, float] = {"fp8": 1.2, "bf16": 2.8}
_MARKERS: dict[Precision, str] = {"fp8": "x", "bf16": "o"}
_COLORS: dict[Precision, str] = {"fp8": "#d1495b", "bf16": "#30638e"}


def plot_losses(records: Mapping[Precision, Sequence[StepRecord]], title: str, file: Path, unit: str = "byte") -> None:
    """Write a PNG: losses by step above, the gap to BF16 below if it was trained too. There must be steps."""
    figure = Figure(figsize=(9, 6.2), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses = {precision: np.array([step["loss"] for step in steps]) for precision, steps in records.items()}
    for precision in sorted(records):
        name, color, marker = precision.upper(), _COLORS[precision], _MARKERS[precision]
        _draw(above, losses[precision], precision, f"{name}, training")
        measured = [(step["step"], step["val_loss"]) for step in records[precision] if "val_loss" in step]
        if measured:
            above.plot(*zip(*measured, strict=True), marker, color=color, mfc="white", label=f"{name}, held-out text")
    above.set_title(title, fontsize=10, loc="left")
    above.set_ylabel(f"loss (nats per {unit})")
    above.legend(frameon=False)
    if len(losses) == 2:
        common = min(map(len, losses.values()))
        below.axhline(0, color=_COLORS["bf16"])
        _draw(below, 100 * (losses["fp8"][:common] / losses["bf16"][:common] - 1), "fp8")
    below.set_ylabel("FP8 over BF16 (%)")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.grid(color="0.9", linewidth=0.6)
    figure.savefig(file)


def _draw(axes: Axes, values: np.ndarray, precision: Precision, label: str | None = None) -> None:
    """Every step, pale, and the mean over a twenty-fifth of the steps."""
    window = max(1, len(values) // 25)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(len(values)) + 1, values, color=_COLORS[precision], linewidth=0.5, alpha=0.25)
    middle = np.arange(len(smooth)) + 1 + window // 2
    axes.plot(middle, smooth, color=_COLORS[precision], linewidth=_WIDTHS[precision], label=label)
