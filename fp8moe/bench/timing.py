"""Medians of repetitions: with CUDA events on a GPU, with a host clock elsewhere."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

Region = Callable[[], object]
"""What is timed: one call."""


def at_once() -> None:
    """What comes before a run that waits for nobody."""


Stages = Sequence[Callable[..., Any]]
"""What is timed as one run, such as forward and backward: the first is called with nothing, each other with the result
of the one before. A region is a run of one stage."""
SetUp = Callable[[], AbstractContextManager[Stages]]
"""Makes ready what is timed. What that holds is given back where the context ends."""
T = TypeVar("T")

REPETITIONS = 5
FIRST_RUNS = 3
"""Runs that compile, load and allocate; the fastest tells how many more fit the budget."""
ORDER_SEED = 0
HOST_TURNS, HOST_RUNS = 3, 8
"""Runs between two waits for the device: fewer launches than its queue holds, or the host would wait within a run."""
CACHE_FLUSH_BYTES = 256 * 2**20
"""Several times the L2 of any GPU (60 MB on an H200). Read in 60 us there."""
LONG_FLUSHES = 5
"""How often it is read where the host's time is not to count: longer than launching one kernel takes."""


@dataclass(frozen=True)
class Timing:
    """What one thing took, in milliseconds. Each repetition has the median of its runs."""

    median_ms: float
    """Of the repetitions."""
    min_ms: float
    """Of the fastest repetition."""
    max_ms: float
    """Of the slowest."""

    @classmethod
    def of(cls, repetitions: Sequence[Sequence[float]]) -> "Timing":
        """Of repetitions whose runs took these milliseconds."""
        medians = [statistics.median(runs) for runs in repetitions]
        return cls(statistics.median(medians), min(medians), max(medians))

    @property
    def spread(self) -> float:
        """From the fastest repetition to the slowest, as a share of the median."""
        return (self.max_ms - self.min_ms) / self.median_ms if self.median_ms else 0.0


@dataclass(frozen=True)
class Laps:
    """Milliseconds of each stage, of each run, of each repetition."""

    repetitions: list[list[tuple[float, ...]]]

    def stage(self, number: int) -> Timing:
        """What this stage took."""
        return Timing.of([[run[number] for run in runs] for runs in self.repetitions])

    def whole(self) -> Timing:
        """What all stages took together."""
        return Timing.of([[sum(run) for run in runs] for runs in self.repetitions])


@dataclass(frozen=True)
class Budget:
    """How long to measure one thing: as many runs as fit, within bounds."""

    milliseconds: float
    """For all repetitions together."""
    repetitions: int = REPETITIONS
    min_runs: int = 3
    """Of a repetition."""
    max_runs: int = 40

    def runs(self, run_ms: float) -> int:
        """How often a repetition runs what takes `run_ms`."""
        fitting = self.milliseconds / self.repetitions / run_ms if run_ms > 0 else self.max_runs
        return int(min(max(fitting, self.min_runs), self.max_runs))


class Stopwatch(Protocol):
    """Times single runs."""

    def laps(self, stages: Stages, runs: int) -> list[tuple[float, ...]]:
        """Milliseconds of each stage of each run."""
        ...


class HostStopwatch:
    """The host's clock, from the call of a stage to its return: all of the time on a CPU, the launches' on a GPU.

    Args:
        clock: seconds from some start.
        meet: called before each run, such as a barrier.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, meet: Region = at_once) -> None:
        self._clock, self._meet = clock, meet

    def laps(self, stages: Stages, runs: int) -> list[tuple[float, ...]]:
        taken = []
        for _ in range(runs):
            self._meet()
            taken.append(_between(_run(stages, self._clock), lambda start, end: (end - start) * 1e3))
        return taken


def host_microseconds(region: Region, device: torch.device) -> float:
    """How long the host is busy with one call, in a loop that runs ahead of `device`, a CUDA device."""
    samples: list[float] = []
    for _ in range(HOST_TURNS):
        torch.cuda.synchronize(device)
        runs = HostStopwatch().laps([region], 1 + HOST_RUNS)[1:]  # after a wait, code is out of the caches
        samples += [milliseconds for (milliseconds,) in runs]
    return statistics.median(samples) * 1e3


class CudaStopwatch:
    """CUDA events on the current stream around each stage, with an L2 that holds nothing of the inputs of a run.

    Args:
        device: the current one.
        flushes: how often the cache is flushed before each run: the host launches the run meanwhile.
        meet: called after that, before the run, such as what makes the devices of several ranks wait for each other.
    """

    def __init__(self, device: torch.device, flushes: int = 1, meet: Region = at_once) -> None:
        self._flush = torch.zeros(CACHE_FLUSH_BYTES // 4, device=device)
        self._flushes, self._meet = flushes, meet

    def laps(self, stages: Stages, runs: int) -> list[tuple[float, ...]]:
        marks = []
        for _ in range(runs):
            for _ in range(self._flushes):
                self._flush.sum()  # reads: lines that were written would go back to memory while the stages run
            self._meet()
            marks.append(_run(stages, _recorded_event))
        torch.cuda.synchronize()
        return [_between(each, lambda start, end: start.elapsed_time(end)) for each in marks]


def stopwatch_for(device: torch.device, flushes: int = 1, meet: Region = at_once) -> Stopwatch:
    """How to time work on `device`, which must be the current one."""
    return CudaStopwatch(device, flushes, meet) if device.type == "cuda" else HostStopwatch(meet=meet)


def measure(region: Region, stopwatch: Stopwatch, budget: Budget) -> Timing:
    """Warm up, then time as many runs as the budget holds."""
    (laps,) = measure_in_turns([ready(region)], stopwatch, budget)
    return laps.whole()


def ready(*stages: Callable[..., Any]) -> SetUp:
    """What is timed needs nothing made ready."""

    @contextmanager
    def set_up() -> Iterator[Stages]:
        yield stages

    return set_up


def measure_in_turns(set_ups: Sequence[SetUp], stopwatch: Stopwatch, budget: Budget) -> list[Laps]:
    """Warm up, then repeat by turns: each repetition measures everything, in a random order of its own.

    A GPU under load slows down as it warms up (by 5% within seconds on an H200): what is measured one after the other
    cannot be compared to less than that. And it recovers while it has little to do: what follows a region that waits
    for the host was 8% faster. The order is the same in each process.
    """
    order = random.Random(ORDER_SEED)
    counts = [_warm_up(set_up, stopwatch, budget) for set_up in set_ups]
    laps: list[list[list[tuple[float, ...]]]] = [[] for _ in set_ups]
    for _ in range(budget.repetitions):
        for set_up, runs, taken in order.sample(list(zip(set_ups, counts, laps, strict=True)), len(set_ups)):
            taken.append(_repeat(set_up, stopwatch, runs))
    return [Laps(repetitions) for repetitions in laps]


# Functions of their own, so that nothing keeps the stages, which may hold a CUDA graph, after their context.
def _warm_up(set_up: SetUp, stopwatch: Stopwatch, budget: Budget) -> int:
    """How many runs a repetition has."""
    with set_up() as stages:
        runs = budget.runs(min(map(sum, stopwatch.laps(stages, FIRST_RUNS))))
        stopwatch.laps(stages, runs * budget.repetitions // 4)  # the clocks of an idle GPU take a while to rise
    return runs


def _repeat(set_up: SetUp, stopwatch: Stopwatch, runs: int) -> list[tuple[float, ...]]:
    """One repetition. The first run, which is not among its laps, starts on an idle device that waits for launches."""
    with set_up() as stages:
        return stopwatch.laps(stages, runs + 1)[1:]


def _run(stages: Stages, mark: Callable[[], T]) -> list[T]:
    """The marks before, between and after the stages. What they return is gone afterwards."""
    marks = [mark()]
    value = stages[0]()
    marks.append(mark())
    for stage in stages[1:]:
        value = stage(value)
        marks.append(mark())
    return marks


def _between(marks: Sequence[T], milliseconds: Callable[[T, T], float]) -> tuple[float, ...]:
    return tuple(milliseconds(start, end) for start, end in itertools.pairwise(marks))


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
