"""What AUTO takes beside eager PyTorch, which knows nothing of FP8, where the choice is hardest."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import SEED
from fp8moe.bench.timing import Budget, Stages, Stopwatch, measure_in_turns, ready
from fp8moe.bench.tune.grid import Case
from fp8moe.bench.tune.measure import Sample
from fp8moe.bench.variants import describe_backends, fp8moe_variants
from fp8moe.gemm.cost import CostModel
from fp8moe.gemm.explain import explain
from fp8moe.gemm.tuning import decided_by

PRODUCTS, LAYERS = 6, 4
"""How many are compared."""


@dataclass(frozen=True)
class Loss:
    """Microseconds of forward and backward of one shape in eager code, launches included."""

    title: str
    taken: str
    """The kernels that AUTO chose."""
    auto_us: float
    pytorch_us: float

    @property
    def ratio(self) -> float:
        """AUTO's time over PyTorch's: above 1 it loses."""
        return self.auto_us / self.pytorch_us


def near_break_even(samples: Sequence[Sample], cases: Sequence[Case], model: CostModel) -> list[Case]:
    """The products and layers for which `model` predicts the least difference between BF16 and FP8.

    Args:
        samples: of `cases`, in their order.
        cases: from which some are chosen.
        model: by whose predictions AUTO chooses.
    """

    def difference(number: int) -> float:
        costs, work = model.costs(samples[number].layer), samples[number].work
        return abs(math.log(costs.fp8.predict_us(work) / costs.bf16.predict_us(work)))

    chosen = []
    for layer, count in ((False, PRODUCTS), (True, LAYERS)):
        numbers = (number for number, sample in enumerate(samples) if sample.layer is layer)
        chosen += [cases[number] for number in sorted(numbers, key=difference)[:count]]
    return chosen


def measure_loss(case: Case, model: CostModel, device: torch.device, stopwatch: Stopwatch, budget: Budget) -> Loss:
    """Time AUTO, decided by `model`, and eager PyTorch by turns.

    Args:
        case: what is measured, in BF16 tensors.
        model: by which AUTO chooses.
        device: where; the current one.
        stopwatch, budget: how, and how long.
    """
    task, shape = case
    problem = task.problem(shape, task.balances[0], device, SEED)
    sizes: dict[str, Any] = {task.explained_as: shape.sizes}
    explained = partial(explain, device, **sizes)
    with decided_by(model):
        auto = fp8moe_variants(task.run(shape), task.options(shape)[:1], explained)[0]
        taken = describe_backends(explained())

    @contextmanager
    def deciding() -> Iterator[Stages]:
        with decided_by(model):
            yield partial(problem.forward, auto.op), problem.backward

    pytorch = ready(partial(problem.forward, task.eager(shape)), problem.backward)
    auto_us, pytorch_us = (
        laps.whole().median_ms * 1e3 for laps in measure_in_turns([deciding, pytorch], stopwatch, budget)
    )
    name = "layer" if task.name == LAYER.name else "grouped_mm"
    return Loss(f"{name} ({shape})", taken, auto_us, pytorch_us)
