"""Medians of many runs: with CUDA events on a GPU, with a host clock elsewhere."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Region = Callable[[], object]
"""What is timed: one call."""

FIRST_RUNS = 3
"""Runs that compile, load and allocate; the fastest tells how many more fit the budget."""
TURNS = 10
HOST_TURNS, HOST_RUNS = 5, 8
"""Runs between two waits for the device: fewer launches than its queue holds, or the host would wait within a run."""
CACHE_FLUSH_BYTES = 256 * 2**20
"""Several times the L2 of any GPU (60 MB on an H200). Read in 60 us there."""
LONG_FLUSHES = 5
"""How often it is read where the host's time is not to count: longer than launching one kernel takes."""


@dataclass(frozen=True)
class Timing:
    """What many runs of one region took, in milliseconds."""

    median_ms: float
    drift: float
    """Median of the last fifth of the runs over that of the first fifth: far from 1, the clocks changed meanwhile."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Of runs that took these milliseconds, in their order."""
        fifth = max(len(samples) // 5, 1)
        drift = statistics.median(samples[-fifth:]) / statistics.median(samples[:fifth])
        return cls(statistics.median(samples), drift)


@dataclass(frozen=True)
class Budget:
    """How long to measure one region: as many runs as fit, within bounds."""

    milliseconds: float
    min_repeats: int = 7
    max_repeats: int = 200

    def repeats(self, run_ms: float) -> int:
        """How often to run what takes `run_ms`."""
        fitting = self.milliseconds / run_ms if run_ms > 0 else self.max_repeats
        return int(min(max(fitting, self.min_repeats), self.max_repeats))


class Stopwatch(Protocol):
    """Times single runs."""

    def samples(self, region: Region, repeats: int) -> list[float]:
        """Milliseconds of each of `repeats` runs of `region`."""
        ...


class HostStopwatch:
    """The host's clock, from the call of a region to its return: all of the time on a CPU, the launches' on a GPU.

    Args:
        clock: seconds from some start.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def samples(self, region: Region, repeats: int) -> list[float]:
        milliseconds = []
        for _ in range(repeats):
            start = self._clock()
            region()
            milliseconds.append((self._clock() - start) * 1e3)
        return milliseconds


def host_microseconds(region: Region, device: torch.device) -> float:
    """How long the host is busy with one call, in a loop that runs ahead of `device`, a CUDA device."""
    samples: list[float] = []
    for _ in range(HOST_TURNS):
        torch.cuda.synchronize(device)
        samples += HostStopwatch().samples(region, 1 + HOST_RUNS)[1:]  # after a wait, code is out of the caches
    return statistics.median(samples) * 1e3


class CudaStopwatch:
    """CUDA events on the current stream around each run, with an L2 that holds nothing of the region's inputs.

    Args:
        device: the current one.
        flushes: how often the cache is flushed before each run: the host launches the run meanwhile.
    """

    def __init__(self, device: torch.device, flushes: int = 1) -> None:
        self._flush = torch.zeros(CACHE_FLUSH_BYTES // 4, device=device)
        self._flushes = flushes

    def samples(self, region: Region, repeats: int) -> list[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for start, end in zip(starts, ends, strict=True):
            for _ in range(self._flushes):
                self._flush.sum()  # reads: lines that were written would go back to memory while the region runs
            start.record()
            region()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def stopwatch_for(device: torch.device, flushes: int = 1) -> Stopwatch:
    """How to time work on `device`, which must be the current one."""
    return CudaStopwatch(device, flushes) if device.type == "cuda" else HostStopwatch()


def measure(region: Region, stopwatch: Stopwatch, budget: Budget) -> Timing:
    """Warm up, then time as many runs as the budget holds."""
    (timing,) = measure_in_turns([region], stopwatch, budget)
    return timing


def measure_in_turns(regions: Sequence[Region], stopwatch: Stopwatch, budget: Budget) -> list[Timing]:
    """Warm up, then time the regions by turns, as many runs of each as the budget holds.

    A GPU under load slows down as it warms up (by 5% within seconds on an H200): what is measured one after the other
    cannot be compared to less than that. And it recovers while it has little to do: what follows a region that waits
    for the host was 8% faster. So each turn has an order of its own.
    """
    order = random.Random(len(regions))
    repeats = [budget.repeats(min(stopwatch.samples(region, FIRST_RUNS))) for region in regions]
    samples: list[list[float]] = [[] for _ in regions]
    for turn in range(-1, TURNS):
        for region, count, taken in order.sample(list(zip(regions, repeats, samples, strict=True)), len(regions)):
            if turn < 0:
                stopwatch.samples(region, count // 4)  # the clocks of an idle GPU take a while to rise
            else:
                runs = count * (turn + 1) // TURNS - count * turn // TURNS
                if runs > 0:  # and one more: the first starts on an idle device, which waits for every launch
                    taken += stopwatch.samples(region, runs + 1)[1:]
    return [Timing.of(taken) for taken in samples]
