"""What the plan says of runs that were measured, beside what they took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8moe.bench.distributed.calibration import Calibration, MeasuredStep, measured_steps, shape_of
from fp8moe.bench.distributed.scaling import ExpertParallelPlan, Machines, plan_expert_parallel
from fp8moe.bench.shapes import Balance, Shape

SAME_SIZES = ("T", "k", "H", "I")
"""What a plan cannot change."""


@dataclass(frozen=True)
class Comparison:
    """One way to compute one layer."""

    shape: Shape
    plan: ExpertParallelPlan
    measured: MeasuredStep

    @property
    def error(self) -> float:
        """Of the predicted step, as a share of the measured one: above 0 it was faster than predicted."""
        return self.plan.step_ms / self.measured.both_ms - 1


def compare(calibrations: Sequence[Calibration], document: Mapping[str, Any], machines: Machines) -> list[Comparison]:
    """Predict the layers with uniform routing in the JSON of another run, each with the rates of a layer of its sizes:
    the one whose number of experts is nearest. Layers of other sizes are left out."""
    found = []
    for problem in document["problems"]:
        shape, ranks = shape_of(problem), document["ranks"]
        alike = [each for each in calibrations if all(each.shape[size] == shape[size] for size in SAME_SIZES)]
        if problem["routing"] != Balance.UNIFORM.value or not alike:
            continue
        nearest = min(alike, key=lambda each: abs(each.shape["E"] - shape["E"])).with_experts(shape["E"])
        found += [
            Comparison(shape, plan_expert_parallel(nearest, machines, ranks, ranks, dispatch), measured)
            for dispatch, measured in measured_steps(problem).items()
        ]
    return found
