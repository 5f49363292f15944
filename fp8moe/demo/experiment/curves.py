"""Loss curves of recipes, and the gaps between them, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fp8moe.demo.experiment.recipes import RECIPES
from fp8moe.demo.experiment.report import of_recipe, present
from fp8moe.demo.experiment.results import Results


def plot(results: Results, file: Path) -> None:
    """Write a PNG with a column for each baseline: losses by token above, gaps to the baseline below.

    Curves are means over seeds and over a twenty-fifth of the steps. A band is the standard error over seeds. Gaps are
    paired by seed.
    """
    recipes = present(results)
    baselines = [recipe for recipe in recipes if RECIPES[recipe].baseline is None]
    figure = Figure(figsize=(9 * max(1, len(baselines)), 7), dpi=120, layout="constrained")
    panels = figure.subplots(2, max(1, len(baselines)), squeeze=False, sharex="col", height_ratios=(3, 2))
    colors = matplotlib.color_sequences["tab10"]
    for column, baseline in enumerate(baselines):
        above, below = panels[:, column]
        runs = {run["seed"]: run for run in of_recipe(results, baseline)}
        family = [baseline, *(recipe for recipe in recipes if RECIPES[recipe].baseline == baseline)]
        for color, recipe in zip(colors, family, strict=False):
            curves, gaps = [], []
            for run in of_recipe(results, recipe):
                tokens = run["config"]["batch_size"] * run["config"]["seq_len"]
                losses = _smooth([step["loss"] for step in run["steps"]])
                curves.append(losses)
                its = (
                    _smooth([step["loss"] for step in runs[run["seed"]]["steps"]])
                    if run["seed"] in runs
                    else losses[:0]
                )
                common = min(len(losses), len(its))
                gaps.append(100 * (losses[:common] / its[:common] - 1))
            _draw(above, curves, tokens, color, f"{recipe} ({len(curves)} seeds)")
            if recipe != baseline:
                _draw(below, gaps, tokens, color, recipe)
        above.set_ylabel(f"training loss (nats per {next(iter(runs.values()))['unit']})")
        above.legend(frameon=False)
        below.axhline(0, color="0.3", linewidth=0.8)
        below.set_ylabel(f"over {baseline} (%)")
        below.set_xlabel("million tokens" if tokens > 10_000 else "thousand tokens")
        for axes in (above, below):
            axes.grid(color="0.9", linewidth=0.6)
    figure.savefig(file)


def _smooth(losses: Sequence[float]) -> np.ndarray:
    window = max(1, len(losses) // 25)
    return np.convolve(losses, np.ones(window) / window, mode="valid") if losses else np.empty(0)


def _draw(axes: matplotlib.axes.Axes, curves: list[np.ndarray], tokens: int, color: object, label: str) -> None:
    common = min(map(len, curves))
    if not common:
        return
    values = np.stack([curve[:common] for curve in curves])
    middle = values.mean(axis=0)
    x = (np.arange(common) + 1) * tokens / (1e6 if tokens > 10_000 else 1e3)
    axes.plot(x, middle, color=color, linewidth=1.2, label=label)
    if len(curves) > 1:
        error = values.std(axis=0, ddof=1) / len(curves) ** 0.5
        axes.fill_between(x, middle - error, middle + error, color=color, alpha=0.2, linewidth=0)
