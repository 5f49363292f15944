"""The results of an experiment as a Markdown table: losses, gaps to BF16, speed, memory, and which kernels ran."""

import math
from collections.abc import Iterable
from statistics import fmean, median, stdev

from fp8moe.demo.experiment.recipes import RECIPES
from fp8moe.demo.experiment.results import Result, Results, own_steps
from fp8moe.demo.experiment.statistics import gap, held_out_loss, pairs, same_trunk, training_loss

_COLUMNS = (
    "recipe", "seeds", "last tenth", "gap", "held-out", "gap", "tokens/s", "to baseline", "memory (GiB)",
    "gradient norm", "GEMMs of a step: FP8", "BF16",
)  # fmt: skip


def markdown(results: Results) -> str:
    """What can be said of the results; every figure comes from them."""
    recipes = present(results)
    lines = [_row(_COLUMNS), _row("---" if index == 0 else "---:" for index in range(len(_COLUMNS)))]
    lines += [_row(_cells(results, recipe)) for recipe in recipes]
    units = "/".join(sorted({result["unit"] for result in results.values()}))
    lines += [
        "",
        f"Losses in nats per {units}: means over seeds, of the last tenth of the steps and of the held-out text after "
        "the last. A gap is relative to the baseline with the same seed, so with the same data and the same parameters "
        "at the start; ± is half the 95% confidence interval of the mean (Student's t over seeds). Tokens/s and "
        "gradient norms (before clipping) are medians over steps and seeds, memory the largest. GEMMs are those of the "
        "experts in one step, counted by the profiler.",
        "",
    ]
    if any(recipe.endswith("bf16-again") for recipe in recipes):
        lines += [
            "`bf16-again` is BF16 with sums in any order. Its gap is the noise floor: what rounding alone does.",
            "",
        ]
    trunk = max(run.get("trunk_steps", 0) for run in results.values())
    if trunk:
        lines += [
            f"The `branched` recipes of a seed go on from one checkpoint, which BF16 trained for {trunk} steps. Up to "
            "there their losses are the same. Tokens/s, gradient norms and memory are those of the steps after it.",
            "",
        ]
    for recipe in recipes:
        runs = of_recipe(results, recipe)
        losses = [held_out_loss(run) for run in runs if not run["diverged"]]
        if RECIPES[recipe].baseline is None and len(losses) > 1:
            spread = stdev(losses) / fmean(losses)
            lines.append(f"- Held-out losses of {recipe} have a standard deviation over seeds of {spread:.3%}.")
        lines += [f"- {recipe} with seed {run['seed']} diverged: {run['diverged']}" for run in runs if run["diverged"]]
        lines += [
            f"- {recipe} with seed {mine['seed']} has another trunk than its baseline, and no gap."
            for mine, its in pairs(results, recipe)
            if not same_trunk(mine, its)
        ]
    environments = dict.fromkeys(
        f"{run['environment']['device']}, torch {run['environment']['torch']}, triton {run['environment']['triton']}"
        for run in results.values()
    )
    lines += [f"- Trained on {environment}." for environment in environments]
    lines += [f"- `AUTO` for these sizes: {auto}." for auto in dict.fromkeys(run["auto"] for run in results.values())]
    return "\n".join(lines) + "\n"


def present(results: Results) -> list[str]:
    """The recipes that have results, in the order of `RECIPES`."""
    return [recipe for recipe in RECIPES if of_recipe(results, recipe)]


def of_recipe(results: Results, recipe: str) -> list[Result]:
    """Its runs, by seed."""
    return sorted((run for run in results.values() if run["recipe"] == recipe), key=lambda run: run["seed"])


def _cells(results: Results, recipe: str) -> list[str]:
    runs = of_recipe(results, recipe)
    finished = [run for run in runs if not run["diverged"]]
    baseline = RECIPES[recipe].baseline
    rate, base_rate = _rate(runs), _rate(of_recipe(results, baseline)) if baseline else math.nan
    norms = [step["grad_norm"] for run in runs for step in own_steps(run)]
    evidence = [run["evidence"] for run in runs if run["evidence"]]
    return [
        recipe,
        str(len(runs)),
        _mean(map(training_loss, finished)),
        str(gap(results, recipe, training_loss)) if baseline else "",
        _mean(map(held_out_loss, finished)),
        str(gap(results, recipe, held_out_loss)) if baseline else "",
        _number(rate, ",.0f"),
        _number(rate / base_rate, ".3f", "x"),
        f"{max(run['peak_memory'] for run in runs) / 2**30:.1f}",
        _number(_median(norms), ".3f"),
        "/".join(dict.fromkeys(str(seen["fp8_gemms"]) for seen in evidence)),
        "/".join(dict.fromkeys(str(seen["bf16_gemms"]) for seen in evidence)),
    ]


def _rate(runs: list[Result]) -> float:
    return _median([step["tokens_per_second"] for run in runs for step in own_steps(run)])


def _median(values: list[float]) -> float:
    return median(values) if values else math.nan


def _number(value: float, form: str, unit: str = "") -> str:
    """Nothing where there is no number: a run may have diverged before its first step."""
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


def _mean(losses: Iterable[float]) -> str:
    values = list(losses)
    return f"{fmean(values):.4f}" if values else "diverged"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
