"""From a problem to figures: every variant and kernel is checked, then measured."""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from fp8moe.bench import peers
from fp8moe.bench.ceilings import Ceilings, moved_bytes
from fp8moe.bench.floor import step_floor_ms
from fp8moe.bench.graphs import captured
from fp8moe.bench.guard import OUT, check, poison_freed_memory
from fp8moe.bench.kernels import Kernel
from fp8moe.bench.memory import grows_with_rows, peak_bytes, saved_tensors, storage_bytes
from fp8moe.bench.problem import Problem, Products
from fp8moe.bench.shapes import Balance, Shape
from fp8moe.bench.task import Task
from fp8moe.bench.timing import Budget, Region, Stopwatch, Timing, host_microseconds, measure, measure_in_turns
from fp8moe.bench.variants import Explain, Variant, fp8moe_variants
from fp8moe.config import KernelPreference

SEED = 0
"""Of the routing and the values."""
LAUNCH_BOUND = 0.5
"""From this share of host time in the whole on, a replay without launches tells something else than the timing."""

T = TypeVar("T")


@dataclass(frozen=True)
class Lab:
    """What measuring takes, on the device that the stopwatches are of."""

    stopwatch: Stopwatch
    kernel_stopwatch: Stopwatch
    """For single kernels, whose time is the device's alone."""
    op_budget: Budget
    """For each timing of a variant."""
    kernel_budget: Budget
    ceilings: Ceilings


@dataclass(frozen=True)
class Failure:
    """A variant or kernel that raised, or computed something wrong: it has no figures."""

    name: str
    is_ours: bool
    error: str


@dataclass(frozen=True)
class Checked:
    """What is known of a variant before it is timed."""

    name: str
    computed_by: str
    sqnr_db: dict[str, float]
    """Against BF16, of the output and each gradient."""
    saved_row_bytes: int
    """Saved for backward, growing with the rows."""


@dataclass(frozen=True)
class Measurement(Checked):
    """The figures of one variant."""

    forward: Timing
    """As in training: with what backward needs made and saved."""
    backward: Timing
    both: Timing
    graph: Timing | None
    """`both` replayed from a CUDA graph."""
    no_graph_because: str | None
    peak_bytes: int | None
    """Above what was held before, over forward and backward, output and gradients included; None on a CPU."""
    host_us: float | None
    """Microseconds until forward and backward return to the caller, in a loop that runs ahead of the device; None on a
    CPU, where that is `both`."""
    speed_against_bf16: float
    """BF16's time for forward and backward over the variant's: above 1 is faster than BF16."""
    saved_against_bf16: float
    """What the variant saves for backward that grows with the rows, over what BF16 saves."""


@dataclass(frozen=True)
class KernelMeasurement:
    """The figures of one kernel."""

    name: str
    timing: Timing
    bytes: int
    """Each input and output byte once."""
    flops: int
    floor_ms: float | None
    sqnr_db: float
    """The least of its checks."""


@dataclass(frozen=True)
class Result:
    """All that was measured of one problem."""

    shape: Shape
    routing: Balance
    group_sizes: list[int]
    floor_ms: float | None
    """Of forward and backward in FP8; None without an FP8 rate."""
    bf16: Measurement
    variants: list[Measurement | Failure]
    """All but BF16."""
    kernels: list[KernelMeasurement | Failure]

    @property
    def failures(self) -> list[Failure]:
        """The variants and kernels that have no figures."""
        return [row for row in (*self.variants, *self.kernels) if isinstance(row, Failure)]


def measure_problem(
    task: Task,
    shape: Shape,
    balance: Balance,
    device: torch.device,
    explains: Iterable[Explain],
    kernel_preferences: set[KernelPreference] | None,
    lab: Lab,
) -> Result:
    """Make the tensors of one problem and measure everything on them.

    Args:
        task, shape, balance: which problem.
        device: where; the current one.
        explains: of the configurations of `fp8moe`.
        kernel_preferences: the backends of the kernel table; None for no table.
        lab: how, and how long.

    Raises:
        Exception: whatever BF16 raises: without it there is nothing to compare with. What a variant raises is a row.
    """
    problem = task.problem(shape, balance, device, SEED)
    baseline = task.baseline(device)
    expected = problem.products(baseline.op)
    bf16 = check_variant(baseline, problem, expected)
    others = [task.peer(problem.group_sizes)] if peers.is_installed(task.peer_package) else []
    for explain in explains:
        others += fp8moe_variants(task.run, task.options, explain)
    rows = [
        (variant, attempt(variant.name, variant.is_ours, partial(check_variant, variant, problem, expected)))
        for variant in others
    ]
    checked = [(baseline, bf16), *((variant, row) for variant, row in rows if isinstance(row, Checked))]
    # What the ratios are made of is timed by turns.
    steps = [partial(problem.products, variant.op) for variant, _ in checked]
    timings = measure_in_turns(steps, lab.stopwatch, lab.op_budget)

    def figures(variant: Variant, found: Checked, both: Timing) -> Measurement:
        step = partial(problem.products, variant.op)
        host_us = host_microseconds(step, device) if device.type == "cuda" else None
        graph, no_graph_because = measure_graph(step, host_us, both, lab)
        # Only now: a capture finds the gradient accumulators of a graph that is alive on another stream.
        out = problem.forward(variant.op)
        return Measurement(
            **vars(found),
            forward=measure(lambda: problem.forward(variant.op), lab.stopwatch, lab.op_budget),
            backward=measure(lambda: problem.backward(out, keep_graph=True), lab.stopwatch, lab.op_budget),
            both=both,
            graph=graph,
            no_graph_because=no_graph_because,
            peak_bytes=peak_bytes(step, device),
            host_us=host_us,
            speed_against_bf16=timings[0].median_ms / both.median_ms,
            saved_against_bf16=found.saved_row_bytes / bf16.saved_row_bytes,
        )

    measured = {
        variant.name: attempt(variant.name, variant.is_ours, partial(figures, variant, found, both))
        for (variant, found), both in list(zip(checked, timings, strict=True))[1:]
    }
    kernels = task.kernels(shape, problem, expected, kernel_preferences) if kernel_preferences is not None else ()
    return Result(
        shape=shape,
        routing=balance,
        group_sizes=problem.group_sizes,
        floor_ms=step_floor_ms(task.step(shape, problem.group_sizes), lab.ceilings),
        bf16=figures(baseline, bf16, timings[0]),
        variants=[row if isinstance(row, Failure) else measured[variant.name] for variant, row in rows],
        kernels=[
            attempt(kernel.name, not kernel.is_bf16, partial(measure_kernel, kernel, problem, expected, lab))
            for kernel in kernels
        ],
    )


def attempt(name: str, is_ours: bool, measurement: Callable[[], T]) -> T | Failure:
    """What `measurement` returns; if it raises, the reason becomes a row of the report, and the others are measured."""
    try:
        return measurement()
    except Exception as error:
        if is_ours:
            traceback.print_exc()
        return Failure(name, is_ours, f"{type(error).__name__}: {error}")


def check_variant(variant: Variant, problem: Problem, expected: Products) -> Checked:
    """How close output and gradients come to `expected`, which kernels computed them, and what they keep.

    Raises:
        WrongResultError: not close enough.
    """
    poison_freed_memory(expected.values())
    for main_grad in problem.main_grads.values():
        main_grad.zero_()
    out = problem.forward(variant.op)
    computed_by = variant.computed_by(out)
    actual = {OUT: out.detach(), **problem.backward(out)}
    for name, main_grad in problem.main_grads.items():
        if actual[name] is main_grad:  # fp32 whatever the dtype of the weight
            actual[name] = main_grad.to(expected[name].dtype)
    computed, wanted = problem.compared(actual), problem.compared(expected)
    sqnr_db = {name: check(name, computed[name], wanted[name], variant.min_sqnr_db) for name in expected}
    saved = saved_tensors(lambda: problem.forward(variant.op))
    growing = (tensor for tensor in saved if grows_with_rows(tensor, len(problem.group_sizes)))
    return Checked(variant.name, computed_by, sqnr_db, storage_bytes(growing))


def measure_graph(region: Region, host_us: float | None, eager: Timing, lab: Lab) -> tuple[Timing | None, str | None]:
    """The time of a replay, or why there is none."""
    if host_us is None:
        return None, "a CPU has no CUDA graphs"
    if host_us < LAUNCH_BOUND * eager.median_ms * 1e3:
        return None, "the device is busy throughout: a graph would change nothing"
    try:
        replay = captured(region)
    except RuntimeError as error:
        return None, f"cannot be captured: {str(error).splitlines()[0]}"
    return measure(replay, lab.stopwatch, lab.op_budget), None


def measure_kernel(kernel: Kernel, problem: Problem, outputs_like: Products, lab: Lab) -> KernelMeasurement:
    """Check one kernel, then time it.

    Raises:
        WrongResultError: it computed something wrong.
    """
    poison_freed_memory(outputs_like.values())
    result = kernel.run()
    sqnr_db = min(check(*checked) for checked in kernel.checks(result))
    num_bytes = moved_bytes(kernel.moves(result), problem.group_sizes)
    del result
    timing = measure(kernel.run, lab.kernel_stopwatch, lab.kernel_budget)
    floor_ms = lab.ceilings.floor_ms(num_bytes, kernel.flops, kernel.is_bf16)
    return KernelMeasurement(kernel.name, timing, num_bytes, kernel.flops, floor_ms, sqnr_db)
