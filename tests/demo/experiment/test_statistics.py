"""Gaps and how sure they are."""

import math
from typing import Any, cast

import pytest

from fp8moe.demo.experiment.results import Result, Results
from fp8moe.demo.experiment.statistics import (
    confidence_margin,
    gap,
    held_out_loss,
    pairs,
    same_trunk,
    t_quantile,
    training_loss,
)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (30, 2.04227), (1000, 1.96234)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=1e-5)


def test_the_margin_is_that_of_the_mean() -> None:
    assert confidence_margin([1.0]) == math.inf
    assert confidence_margin([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)


def result(recipe: str, baseline: str | None, seed: int, losses: list[float]) -> Result:
    steps: Any = [{"loss": loss} for loss in losses]
    steps[-1]["val_loss"] = 2 * losses[-1]
    made: Any = {"recipe": recipe, "baseline": baseline, "seed": seed, "steps": steps, "diverged": None}
    return cast(Result, made)


def test_gaps_are_paired_by_seed() -> None:
    runs = [result("bf16", None, seed, [9.0] * 19 + [base]) for seed, base in ((0, 1.0), (1, 100.0), (3, 5.0))]
    runs += [result("fp8", "bf16", seed, [9.0] * 19 + [loss]) for seed, loss in ((0, 1.01), (1, 103.0), (2, 7.0))]
    results: Results = {str(number): run for number, run in enumerate(runs)}
    found = gap(results, "fp8", held_out_loss)
    assert found.values == pytest.approx((0.01, 0.03))  # seeds 2 and 3 have no partner
    assert found.mean == pytest.approx(0.02)
    assert str(found) == f"+2.000% ± {found.margin:.3%}"
    assert training_loss(runs[0]) == pytest.approx(5.0)  # of the last two of twenty steps

    results["3"]["diverged"] = "inf"
    assert gap(results, "fp8", held_out_loss).values == pytest.approx((0.03,))
    assert str(gap(results, "fp8", held_out_loss)) == "+3.000%"


def test_branches_of_different_trunks_have_no_gap() -> None:
    runs = [result("bf16", None, seed, [5.0, 4.0, 2.0]) for seed in range(4)]
    runs += [result("fp8", "bf16", 0, [5.0, 4.0, 2.2]), result("fp8", "bf16", 1, [5.0, 4.0 + 1e-9, 2.2])]
    runs += [result("fp8", "bf16", seed, [5.0, 4.0, 2.2]) for seed in (2, 3)]
    for run in runs:
        run["trunk_steps"] = 2
    runs[-2]["trunk_steps"] = 1  # it left the trunk earlier
    del runs[-1]["trunk_steps"]  # or has none
    results: Results = {str(number): run for number, run in enumerate(runs)}
    assert gap(results, "fp8", training_loss).values == pytest.approx((0.1,))
    assert [mine["seed"] for mine, its in pairs(results, "fp8") if not same_trunk(mine, its)] == [1, 2, 3]
