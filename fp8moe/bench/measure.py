"""From a problem to figures: every variant and kernel is checked, then measured."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from fp8moe.bench import peers
from fp8moe.bench.ceilings import Ceilings, moved_bytes
from fp8moe.bench.figures import Checked, Failure, KernelMeasurement, Measurement, Result
from fp8moe.bench.floor import step_floor_ms
from fp8moe.bench.graphs import captured, replaying
from fp8moe.bench.guard import OUT, check, poison_freed_memory
from fp8moe.bench.kernels import Kernel
from fp8moe.bench.memory import grows_with_rows, peak_bytes, saved_tensors, storage_bytes
from fp8moe.bench.problem import Problem, Products
from fp8moe.bench.shapes import Balance, Shape
from fp8moe.bench.task import Task
from fp8moe.bench.timing import (
    Budget,
    Laps,
    Region,
    Stages,
    Stopwatch,
    Timing,
    host_microseconds,
    measure,
    measure_in_turns,
)
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
    """For each variant, and for the replays of its graph."""
    kernel_budget: Budget
    ceilings: Ceilings


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
        Exception: whatever the reference raises, or PyTorch's eager BF16: without these there is nothing to compare
            with. What another variant raises is a row.
    """
    problem = task.problem(shape, balance, device, SEED)
    expected = problem.products(task.reference(shape))
    variants = task.baselines(shape, device)
    if peers.is_installed(task.peer_package) and (peer := task.peer(shape, problem.group_sizes)):
        variants.append(peer)
    for explain in explains:
        variants += fp8moe_variants(task.run(shape), task.options(shape), explain)

    def check(variant: Variant) -> Checked:
        with in_use(variant, problem):
            return check_variant(variant, problem, expected)

    eager, *others = variants
    rows: dict[str, Checked | Failure | Measurement] = {eager.name: check(eager)}
    rows |= {variant.name: attempt(variant.name, variant.is_ours, partial(check, variant)) for variant in others}
    measured = _measure_variants(
        [(variant, row) for variant in variants if isinstance(row := rows[variant.name], Checked)], problem, device, lab
    )
    rows |= measured
    fastest = measured[eager.name].compared_with
    kernels = task.kernels(shape, problem, expected, kernel_preferences) if kernel_preferences is not None else ()
    return Result(
        shape=shape,
        routing=balance,
        group_sizes=problem.group_sizes,
        floor_ms=step_floor_ms(task.step(shape, problem.group_sizes), lab.ceilings),
        bf16=measured[fastest],
        variants=[row for name, row in rows.items() if name != fastest and isinstance(row, Measurement | Failure)],
        kernels=[
            attempt(kernel.name, not kernel.is_bf16, partial(measure_kernel, kernel, problem, expected, lab))
            for kernel in kernels
        ],
    )


@contextmanager
def in_use(variant: Variant, problem: Problem) -> Iterator[Stages]:
    """The forward and the backward of a variant. What it holds between runs is given back where the context ends."""
    if variant.main_grad:
        _ = problem.main_grads  # from here on there are some
    try:
        yield partial(problem.forward, variant.op), problem.backward
    finally:
        variant.release()
        problem.drop_main_grads()


def _measure_variants(
    checked: Sequence[tuple[Variant, Checked]], problem: Problem, device: torch.device, lab: Lab
) -> dict[str, Measurement]:
    """All figures, by name: times by turns, since ratios are made of them."""
    found = {variant.name: row for variant, row in checked}
    set_ups = [partial(in_use, variant, problem) for variant, _ in checked]
    laps = dict(zip(found, measure_in_turns(set_ups, lab.stopwatch, lab.op_budget), strict=True))
    on_host = {variant.name: _host_and_peak(variant, problem, device) for variant, _ in checked}
    graphs = _measure_graphs(checked, problem, laps, {name: host_us for name, (host_us, _) in on_host.items()}, lab)
    fastest = {main_grad: _fastest(checked, laps, main_grad) for main_grad in (False, True)}

    def figures(variant: Variant) -> Measurement:
        name = variant.name
        with_like = fastest[variant.main_grad] or fastest[False]
        if with_like is None:
            raise ValueError("none of PyTorch's ways is among what was checked")
        host_us, most = on_host[name]
        graph, no_graph_because = graphs[name]
        both = laps[name].whole()
        return Measurement(
            **vars(found[name]),
            forward=laps[name].stage(0),
            backward=laps[name].stage(1),
            both=both,
            graph=graph,
            no_graph_because=no_graph_because,
            peak_bytes=most,
            host_us=host_us,
            compared_with=with_like,
            speed_against_bf16=laps[with_like].whole().median_ms / both.median_ms,
            saved_against_bf16=found[name].saved_row_bytes / found[with_like].saved_row_bytes,
        )

    return {variant.name: figures(variant) for variant, _ in checked}


def _fastest(checked: Sequence[tuple[Variant, Checked]], laps: Mapping[str, Laps], main_grad: bool) -> str | None:
    """Of PyTorch's ways in BF16, with or without `main_grad`s; None if there is none."""
    names = [variant.name for variant, _ in checked if variant.is_baseline and variant.main_grad is main_grad]
    return min(names, key=lambda name: laps[name].whole().median_ms, default=None)


def _host_and_peak(variant: Variant, problem: Problem, device: torch.device) -> tuple[float | None, int | None]:
    """Microseconds of the host, and bytes; None on a CPU."""
    if device.type != "cuda":
        return None, None
    step = partial(problem.products, variant.op)
    with in_use(variant, problem):
        return host_microseconds(step, device), peak_bytes(step, device)


def _measure_graphs(
    checked: Sequence[tuple[Variant, Checked]],
    problem: Problem,
    laps: Mapping[str, Laps],
    host_us: Mapping[str, float | None],
    lab: Lab,
) -> dict[str, tuple[Timing | None, str | None]]:
    """The time of a replay, or why there is none. They take turns as well, each captured anew."""
    reasons = {}
    for variant, _ in checked:
        with in_use(variant, problem):
            step, eager_ms = partial(problem.products, variant.op), laps[variant.name].whole().median_ms
            reasons[variant.name] = why_no_graph(step, host_us[variant.name], eager_ms)

    @contextmanager
    def replay(variant: Variant) -> Iterator[Stages]:
        with in_use(variant, problem), replaying(partial(problem.products, variant.op)) as stages:
            yield stages

    captured_ones = [variant for variant, _ in checked if reasons[variant.name] is None]
    timed = measure_in_turns([partial(replay, variant) for variant in captured_ones], lab.stopwatch, lab.op_budget)
    timings = {variant.name: laps.whole() for variant, laps in zip(captured_ones, timed, strict=True)}
    return {name: (timings.get(name), reason) for name, reason in reasons.items()}


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
    main_grads = problem.main_grads if variant.main_grad else {}
    for main_grad in main_grads.values():
        main_grad.zero_()
    out = problem.forward(variant.op)
    computed_by = variant.computed_by(out)
    actual = {OUT: out.detach(), **problem.backward(out)}
    for name, main_grad in main_grads.items():
        if actual[name] is main_grad:  # fp32 whatever the dtype of the weight
            actual[name] = main_grad.to(expected[name].dtype)
    computed, wanted = problem.compared(actual), problem.compared(expected)
    sqnr_db = {name: check(name, computed[name], wanted[name], variant.min_sqnr_db) for name in expected}
    saved = saved_tensors(lambda: problem.forward(variant.op))
    growing = (tensor for tensor in saved if grows_with_rows(tensor, len(problem.group_sizes)))
    return Checked(variant.name, computed_by, sqnr_db, storage_bytes(growing))


def why_no_graph(region: Region, host_us: float | None, eager_ms: float) -> str | None:
    """Why no CUDA graph of a region is timed; None if one can be."""
    if host_us is None:
        return "a CPU has no CUDA graphs"
    if host_us < LAUNCH_BOUND * eager_ms * 1e3:
        return "the device is busy throughout: a graph would change nothing"
    region()
    try:
        captured(region)
    except RuntimeError as error:
        return f"cannot be captured: {str(error).splitlines()[0]}"
    return None


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
