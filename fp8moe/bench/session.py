"""A run: every variant and kernel on every problem, one problem at a time."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch

from fp8moe.bench.kernels import KernelMeasurement, measure_kernel
from fp8moe.bench.ops import Failure, Lab, Measurement, attempt, measure_variant
from fp8moe.bench.shapes import AnyShape
from fp8moe.bench.task import AProblem, Task
from fp8moe.bench.timing import measure_in_turns
from fp8moe.bench.variants import Variant
from fp8moe.config import KernelPreference


@dataclass(frozen=True)
class ProblemResult:
    """All that was measured of one problem."""

    shape: AnyShape
    routing: Enum
    group_sizes: list[int]
    bf16: Measurement
    variants: list[Measurement | Failure]
    """All but BF16."""
    kernels: list[KernelMeasurement | Failure]

    def speed(self, measurement: Measurement) -> float:
        """BF16's time for forward and backward over the variant's: above 1 is faster than BF16."""
        return self.bf16.both.median_ms / measurement.both.median_ms

    def saved_ratio(self, measurement: Measurement) -> float:
        """What the variant saves for backward that grows with the rows, over what BF16 saves."""
        return measurement.saved_row_bytes / self.bf16.saved_row_bytes

    @property
    def measured(self) -> list[Measurement]:
        """The variants that have figures."""
        return [variant for variant in self.variants if isinstance(variant, Measurement)]

    @property
    def failures(self) -> list[Failure]:
        """The variants and kernels that have none."""
        return [row for row in (*self.variants, *self.kernels) if isinstance(row, Failure)]


def measure_problem(
    task: Task[AProblem],
    variants: Iterable[Variant],
    kernel_preferences: Iterable[KernelPreference] | None,
    dtype: torch.dtype,
    seed: int,
    lab: Lab,
) -> ProblemResult:
    """Make the tensors of one problem and measure everything on them.

    Args:
        task: which problem.
        variants: all but BF16.
        kernel_preferences: the backends of the kernel table; None for no table.
        dtype: of the activations, gradients and weights.
        seed: of their values.
        lab: where and how long to measure.

    Raises:
        Exception: whatever BF16 raises: without it there is nothing to compare with. What a variant raises is a row.
    """
    problem = task.problem(dtype, lab.device, seed)
    baseline = task.baseline(lab.device)
    expected = problem.products(baseline.op)
    bf16 = measure_variant(baseline, problem, expected, lab)
    rows = [
        (
            variant,
            attempt(variant.name, variant.is_ours, partial(measure_variant, variant, problem, expected, lab)),
        )
        for variant in variants
    ]
    # What the ratios are made of, once more and by turns.
    measured = [(baseline, bf16), *((variant, row) for variant, row in rows if isinstance(row, Measurement))]
    steps = [partial(problem.products, variant.op) for variant, _ in measured]
    timings = measure_in_turns(steps, lab.stopwatch, lab.op_budget)
    compared = {row.name: replace(row, both=both) for (_, row), both in zip(measured, timings, strict=True)}
    kernel_rows = []
    if kernel_preferences is not None:
        kernel_rows = [
            attempt(kernel.name, kernel.is_ours, partial(measure_kernel, kernel, expected, lab))
            for kernel in task.kernels(problem, expected, kernel_preferences)
        ]
    return ProblemResult(
        shape=task.shape,
        routing=task.routing,
        group_sizes=problem.group_sizes,
        bf16=compared[bf16.name],
        variants=[compared.get(row.name, row) for _, row in rows],
        kernels=kernel_rows,
    )
