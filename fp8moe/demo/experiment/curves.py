"""Loss curves of recipes, and the gaps between them, as a picture."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fp8moe.demo.experiment.recipes import RECIPES
from fp8moe.demo.experiment.report import of_recipe, present
from fp8moe.demo.experiment.results import Result, Results
from fp8moe.demo.experiment.statistics import comparable_pairs


def plot(results: Results, file: Path) -> None:
    """Write a PNG with a column for each baseline: losses by token above, gaps to the baseline below.

    Curves are means over seeds and over a twenty-fifth of the steps. A band is the standard error over seeds. Gaps are
    paired by seed. A dotted line is where branches leave their trunk; up to there their gaps are zero.
    """
    recipes = present(results)
    baselines = [recipe for recipe in recipes if RECIPES[recipe].baseline is None]
    figure = Figure(figsize=(9 * max(1, len(baselines)), 7), dpi=120, layout="constrained")
    panels = figure.subplots(2, max(1, len(baselines)), squeeze=False, sharex="col", height_ratios=(3, 2))
    colors = matplotlib.color_sequences["tab10"]
    for column, baseline in enumerate(baselines):
        above, below = panels[:, column]
        first = of_recipe(results, baseline)[0]
        tokens, window = first["config"]["batch_size"] * first["config"]["seq_len"], _window(first)
        family = [baseline, *(recipe for recipe in recipes if RECIPES[recipe].baseline == baseline)]
        for color, recipe in zip(colors, family, strict=False):
            curves = [_losses(run) for run in of_recipe(results, recipe)]
            seeds = "1 seed" if len(curves) == 1 else f"{len(curves)} seeds"
            _draw(above, curves, window, tokens, color, f"{recipe} ({seeds})")
            compared = [(_losses(mine), _losses(its)) for mine, its in comparable_pairs(results, recipe)]
            lengths = [min(map(len, pair)) for pair in compared]
            gaps = [
                100 * (mine[:common] / its[:common] - 1) for (mine, its), common in zip(compared, lengths, strict=True)
            ]
            _draw(below, gaps, window, tokens, color, recipe)
        if trunk := first.get("trunk_steps", 0):
            for axes in (above, below):
                axes.axvline(trunk * tokens / _unit(tokens), color="0.3", linewidth=0.8, linestyle=":")
        above.set_ylabel(f"training loss (nats per {first['unit']})")
        above.legend(frameon=False)
        below.axhline(0, color="0.3", linewidth=0.8)
        below.set_ylabel(f"over {baseline} (%)")
        below.set_xlabel("million tokens" if tokens > 10_000 else "thousand tokens")
        for axes in (above, below):
            axes.grid(color="0.9", linewidth=0.6)
    figure.savefig(file)


def _unit(tokens: int) -> float:
    """Of the axis of tokens, for so many in a step."""
    return 1e6 if tokens > 10_000 else 1e3


def _window(run: Result) -> int:
    """Steps of which a point of the curve is the mean, the last of them where it lies."""
    return max(1, int(run["config"]["steps"]) // 25)


def _losses(run: Result) -> np.ndarray:
    losses, window = [step["loss"] for step in run["steps"]], _window(run)
    return np.convolve(losses, np.ones(window) / window, mode="valid") if len(losses) >= window else np.empty(0)


def _draw(
    axes: matplotlib.axes.Axes, curves: list[np.ndarray], window: int, tokens: int, color: object, label: str
) -> None:
    common = min(map(len, curves), default=0)
    if not common:
        return
    values = np.stack([curve[:common] for curve in curves])
    middle = values.mean(axis=0)
    x = (np.arange(common) + window) * tokens / _unit(tokens)
    axes.plot(x, middle, color=color, linewidth=1.2, label=label)
    if len(curves) > 1:
        error = values.std(axis=0, ddof=1) / len(curves) ** 0.5
        axes.fill_between(x, middle - error, middle + error, color=color, alpha=0.2, linewidth=0)
