"""What one shape takes in each of the ways between which AUTO chooses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fp8moe.bench.graphs import captured
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import SEED
from fp8moe.bench.problem import Op
from fp8moe.bench.timing import Budget, Region, Stopwatch, measure_in_turns, ready
from fp8moe.bench.tune.grid import Case
from fp8moe.bench.variants import fp8moe_variants
from fp8moe.config import FP8Config
from fp8moe.gemm.cost import Cost, CostModel, Costs, OpSize
from fp8moe.gemm.explain import explain
from fp8moe.gemm.tuning import decided_by

FP8_ONLY = FP8Config(allow_bf16=False)
_NOTHING, _ANYTHING = Cost(0, 0, 0, 0), Cost(1, 0, 0, 0)
_PREFERS_BF16 = Costs(bf16=_NOTHING, fp8=_ANYTHING, fp8_cached=_ANYTHING)
ALWAYS_BF16 = CostModel("any", "never", product=_PREFERS_BF16, layer=_PREFERS_BF16)


@dataclass(frozen=True)
class Sample:
    """Microseconds of forward and backward of one shape on the device, without launches from the host."""

    title: str
    layer: bool
    work: OpSize
    bf16_us: float
    """What AUTO runs in BF16."""
    fp8_us: float
    """What AUTO runs in FP8, with the weights quantized in each forward and each backward."""
    fp8_cached_us: float
    """The same with fresh weight caches."""
    host_us: tuple[float, float, float] | None = None
    """What the host needs to launch each of the three, in their order; None where it was not measured."""


def measure_case(
    case: Case,
    device: torch.device,
    stopwatch: Stopwatch,
    budget: Budget,
    launches: Callable[[Region], float] | None,
    capture: Callable[[Region], Region] = captured,
) -> Sample:
    """Run each way, capture it, and time the replays by turns.

    Args:
        case: what is measured, in BF16 tensors.
        device: where; the current one.
        stopwatch, budget: how, and how long each way.
        launches: microseconds that the host needs for a region that has run; None: they are not measured.
        capture: turns a region that has run into what is timed.

    Raises:
        RuntimeError: a way cannot be captured, or needs more memory than there is.
    """
    task, shape = case
    problem = task.problem(shape, task.balances[0], device, SEED)

    def ways(config: FP8Config) -> dict[str, Op]:
        variants = fp8moe_variants(task.run(shape), task.options(shape), partial(explain, device, config))
        return {variant.name: variant.op for variant in variants}

    either, fp8 = ways(FP8Config())["fp8moe auto"], ways(FP8_ONLY)

    def in_bf16() -> object:
        with decided_by(ALWAYS_BF16):
            return problem.products(either)

    replays, host_us = [], []
    for region in (
        in_bf16,
        partial(problem.products, fp8["fp8moe auto"]),
        partial(problem.products, fp8["fp8moe auto cached"]),
    ):
        region()
        if launches is not None:
            host_us.append(launches(region))
        replays.append(capture(region))
    laps = measure_in_turns([ready(replay) for replay in replays], stopwatch, budget)
    bf16_us, fp8_us, fp8_cached_us = (each.whole().median_ms * 1e3 for each in laps)
    host = (host_us[0], host_us[1], host_us[2]) if host_us else None
    layer = task is LAYER
    title = f"{'layer' if layer else 'grouped_mm'} ({shape})"
    return Sample(title, layer, case.work, bf16_us, fp8_us, fp8_cached_us, host)
