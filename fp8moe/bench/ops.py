"""One row of a problem's table: everything that is measured of one variant."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fp8moe.bench.floor import Ceilings
from fp8moe.bench.graphs import captured
from fp8moe.bench.guard import OUT, Agreement, check, poison_freed_memory
from fp8moe.bench.memory import belongs_to_weight, grows_with_rows, peak_bytes, saved_tensors, storage_bytes
from fp8moe.bench.problem import Problem, Products
from fp8moe.bench.timing import Budget, Region, Stopwatch, Timing, host_microseconds, measure
from fp8moe.bench.variants import Variant

LAUNCH_BOUND = 0.5
"""From this share of host time in the whole on, a replay without launches tells something else than the timing."""

T = TypeVar("T")


@dataclass(frozen=True)
class Lab:
    """What measuring takes."""

    device: torch.device
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
class Measurement:
    """The figures of one variant."""

    name: str
    computed_by: str
    agreement: dict[str, Agreement]
    """With BF16, of the output and each gradient."""
    forward: Timing
    """As in training: with what backward needs made and saved."""
    backward: Timing
    both: Timing
    graph: Timing | None
    """`both` replayed from a CUDA graph."""
    no_graph_because: str | None
    forward_floor_ms: float | None
    backward_floor_ms: float | None
    both_floor_ms: float | None
    saved_row_bytes: int
    """Saved for backward, growing with the rows."""
    saved_weight_bytes: int
    """Saved for backward, the weights or made of them."""
    peak_bytes: int | None
    """Above what was held before, over forward and backward, output and gradients included; None on a CPU."""
    host_us: float | None
    """Microseconds until forward and backward return to the caller, in a loop that runs ahead of the device; None on a
    CPU, where that is `both`."""


def attempt(name: str, is_ours: bool, measurement: Callable[[], T]) -> T | Failure:
    """What `measurement` returns; if it raises, the reason becomes a row of the report, and the others are measured."""
    try:
        return measurement()
    except Exception as error:
        if is_ours:
            traceback.print_exc()
        return Failure(name, is_ours, f"{type(error).__name__}: {error}")


def measure_variant(variant: Variant, problem: Problem, expected: Products, lab: Lab) -> Measurement:
    """Check one variant against `expected`, then measure it.

    Raises:
        WrongResultError: its output or a gradient is wrong.
    """

    def step() -> Products:
        return problem.products(variant.op)

    agreement, computed_by = check_variant(variant, problem, expected)
    saved_row_bytes, saved_weight_bytes = saved_by(variant, problem)
    both = measure(step, lab.stopwatch, lab.op_budget)
    host_us = host_microseconds(step, lab.device) if lab.device.type == "cuda" else None
    graph, no_graph_because = measure_graph(step, host_us, both, lab)
    forward_kernels = problem.forward_work(variant.precision)
    backward_kernels = problem.backward_work(variant.precision)
    return Measurement(
        name=variant.name,
        computed_by=computed_by,
        agreement=agreement,
        forward=measure(lambda: problem.forward(variant.op), lab.stopwatch, lab.op_budget),
        backward=measure_backward(problem.forward(variant.op), problem, lab),
        both=both,
        graph=graph,
        no_graph_because=no_graph_because,
        forward_floor_ms=lab.ceilings.floor_ms(forward_kernels),
        backward_floor_ms=lab.ceilings.floor_ms(backward_kernels),
        both_floor_ms=lab.ceilings.floor_ms(forward_kernels + backward_kernels),
        saved_row_bytes=saved_row_bytes,
        saved_weight_bytes=saved_weight_bytes,
        peak_bytes=peak_bytes(step, lab.device),
        host_us=host_us,
    )


def check_variant(variant: Variant, problem: Problem, expected: Products) -> tuple[dict[str, Agreement], str]:
    """How close output and gradients come to `expected`, and which kernels computed them.

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
    return {name: check(name, computed[name], wanted[name], variant.limits.of(name)) for name in expected}, computed_by


def saved_by(variant: Variant, problem: Problem) -> tuple[int, int]:
    """Bytes saved for backward: what grows with the rows, and the weights or what is made of them."""
    saved = saved_tensors(lambda: problem.forward(variant.op))
    return (
        storage_bytes(tensor for tensor in saved if grows_with_rows(tensor, problem.shape.e)),
        storage_bytes(tensor for tensor in saved if belongs_to_weight(tensor)),
    )


def measure_backward(out: Tensor, problem: Problem, lab: Lab) -> Timing:
    """The backward that starts at `out`, over and over on one graph."""
    return measure(lambda: problem.backward(out, keep_graph=True), lab.stopwatch, lab.op_budget)


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
