"""Losses of a recipe against its baseline, paired by seed, with the confidence that so few seeds allow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from fp8moe.demo.experiment.results import Result, Results

Measure = Callable[[Result], float]


def training_loss(result: Result) -> float:
    """The mean over the last tenth of the steps."""
    losses = [step["loss"] for step in result["steps"]]
    return fmean(losses[-max(1, len(losses) // 10) :])


def held_out_loss(result: Result) -> float:
    """After the last step."""
    return next((step["val_loss"] for step in reversed(result["steps"]) if "val_loss" in step), math.nan)


@dataclass(frozen=True)
class Gap:
    """How much larger the losses of a recipe are than its baseline's, relative to those: a mean over seeds."""

    values: tuple[float, ...]
    """One a seed that both have, and neither diverged."""

    @property
    def mean(self) -> float:
        return fmean(self.values) if self.values else math.nan

    @property
    def margin(self) -> float:
        """Half the width of the 95% confidence interval (Student's t); infinite for a single pair."""
        return confidence_margin(self.values)

    def __str__(self) -> str:
        if not self.values:
            return "none"
        return f"{self.mean:+.3%}" + (f" ± {self.margin:.3%}" if len(self.values) > 1 else "")


def gap(results: Results, recipe: str, measure: Measure) -> Gap:
    """Of a recipe to its baseline, over the pairs that may be compared."""
    finished = [pair for pair in comparable_pairs(results, recipe) if not any(run["diverged"] for run in pair)]
    return Gap(tuple(measure(mine) / measure(its) - 1 for mine, its in finished))


def pairs(results: Results, recipe: str) -> list[tuple[Result, Result]]:
    """The runs of a recipe, by seed, each with its baseline's run of that seed."""
    runs = {result["seed"]: result for result in results.values() if result["recipe"] == recipe}
    baseline = next((run["baseline"] for run in runs.values()), None)
    others = {result["seed"]: result for result in results.values() if result["recipe"] == baseline}
    return [(runs[seed], others[seed]) for seed in sorted(runs.keys() & others.keys())]


def comparable_pairs(results: Results, recipe: str) -> list[tuple[Result, Result]]:
    """Of `pairs` those that `same_trunk` allows."""
    return [pair for pair in pairs(results, recipe) if same_trunk(*pair)]


def same_trunk(mine: Result, its: Result) -> bool:
    """Whether two runs go on from one checkpoint, or neither goes on from any.

    A trunk may have been trained anew, on another machine with other rounding. Then a gap would be that between the
    trunks. So branches are compared only if the losses of their trunks are equal, every bit of them.
    """
    trunks = [[step["loss"] for step in run["steps"][: run.get("trunk_steps", 0)]] for run in (mine, its)]
    return trunks[0] == trunks[1]


def confidence_margin(values: Sequence[float]) -> float:
    """Half the width of the 95% confidence interval of a mean; infinite for fewer than two values."""
    if len(values) < 2:
        return math.inf
    return t_quantile(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, for a probability above one half.

    With `t = sqrt(freedom) * tan(angle)` the density becomes a power of a cosine on `(-pi/2, pi/2)`, which Simpson's
    rule integrates with ease; bisection does the rest.
    """
    factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def above_half(angle: float, intervals: int = 400) -> float:
        width = angle / intervals
        weights = (1 if index in (0, intervals) else 4 if index % 2 else 2 for index in range(intervals + 1))
        heights = (math.cos(index * width) ** (freedom - 1) for index in range(intervals + 1))
        return factor * width / 3 * sum(weight * height for weight, height in zip(weights, heights, strict=True))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
