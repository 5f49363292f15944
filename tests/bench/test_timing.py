"""Medians of a clock that the test turns."""

import itertools

import pytest
import torch

from fp8moe.bench import timing as timing_module
from fp8moe.bench.timing import (
    Budget,
    CudaStopwatch,
    HostStopwatch,
    Region,
    Timing,
    host_microseconds,
    measure,
    measure_in_turns,
)


class FakeClock:
    """Stands still but for what is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """A region that takes these milliseconds, one after the other, and the last ever after."""

    def __init__(self, clock: FakeClock, milliseconds: list[float]) -> None:
        self.clock = clock
        self.milliseconds = milliseconds
        self.runs = 0

    def __call__(self) -> None:
        self.clock.now += self.milliseconds[min(self.runs, len(self.milliseconds) - 1)] / 1e3
        self.runs += 1


def test_samples_are_the_time_of_each_run() -> None:
    clock = FakeClock()
    assert HostStopwatch(clock=clock).samples(Work(clock, [3, 1, 2]), 3) == pytest.approx([3, 1, 2])


def test_median_leaves_out_warm_up_and_outliers() -> None:
    clock = FakeClock()
    first_runs, more_warm_up = [5000, 2, 2], [50, 50]
    first_of_turn = 70
    turns = [1, 1, 1, 2, 2, 2, 3, 3, 3, 900]
    measured = [sample for turn in turns for sample in (first_of_turn, turn)]
    work = Work(clock, [*first_runs, *more_warm_up, *measured])
    timing = measure(work, HostStopwatch(clock=clock), Budget(20, min_repeats=1, max_repeats=99))  # 20 ms / 2 ms: 10
    assert timing.median_ms == pytest.approx(2)
    assert work.runs == 25


def test_median_of_an_even_number_lies_between() -> None:
    clock = FakeClock()
    work = Work(clock, [1, 1, 1, 1, 70, 4, 70, 2, 70, 8, 70, 8])
    timing = measure(work, HostStopwatch(clock=clock), Budget(1, min_repeats=4))
    assert timing.median_ms == pytest.approx(6)


@pytest.mark.parametrize(("run_ms", "repeats"), [(1.0, 30), (1000.0, 7), (1e-9, 200), (0.0, 200)])
def test_budget_is_kept_within_bounds(run_ms: float, repeats: int) -> None:
    assert Budget(30).repeats(run_ms) == repeats


def test_events_surround_the_region_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CudaStopwatch` on a device whose events read the fake clock."""
    clock = FakeClock()
    waits: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.recorded: float | None = None

        def record(self) -> None:
            self.recorded = clock.now

        def elapsed_time(self, end: "Event") -> float:
            assert waits  # an event that the device has not passed yet cannot be read
            assert self.recorded is not None
            assert end.recorded is not None
            return (end.recorded - self.recorded) * 1e3

    class Flush:
        def sum(self) -> None:
            clock.now += 1000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(clock.now))
    monkeypatch.setattr(timing_module, "CACHE_FLUSH_BYTES", 64)
    stopwatch = CudaStopwatch(torch.device("cpu"))
    monkeypatch.setattr(stopwatch, "_flush", Flush())
    assert stopwatch.samples(Work(clock, [3, 1, 2]), 3) == pytest.approx([3, 1, 2])
    assert waits == [pytest.approx(3000.006)]
    patient = CudaStopwatch(torch.device("cpu"), flushes=4)
    monkeypatch.setattr(patient, "_flush", Flush())
    assert patient.samples(Work(clock, [3]), 1) == pytest.approx([3])
    assert waits[1] == pytest.approx(3000.006 + 4000.003)


def test_the_hosts_time_is_that_of_a_loop_that_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    class Launches:
        """Takes much longer right after a wait."""

        cold = True

        def __call__(self) -> None:
            clock.now += 9.0 if self.cold else 0.002
            self.cold = False

    region = Launches()

    def wait(device: torch.device) -> None:
        region.cold = True

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(timing_module, "HostStopwatch", lambda: HostStopwatch(clock=clock))
    assert host_microseconds(region, torch.device("cuda:0")) == pytest.approx(2000)


def test_regions_take_turns_so_that_a_slowing_clock_slows_all() -> None:
    clock = FakeClock()
    started = clock.now

    class Slowing:
        """Takes longer the later it is."""

        def __init__(self, milliseconds: float) -> None:
            self.milliseconds = milliseconds

        def __call__(self) -> None:
            clock.now += self.milliseconds / 1e3 * (1 + (clock.now - started))

    budget = Budget(200, min_repeats=50, max_repeats=50)
    one, other = measure_in_turns([Slowing(1), Slowing(2)], HostStopwatch(clock=clock), budget)
    assert other.median_ms / one.median_ms == pytest.approx(2, rel=0.02)
    alone = [measure(Slowing(milliseconds), HostStopwatch(clock=clock), budget).median_ms for milliseconds in (1, 2)]
    assert alone[1] / alone[0] > 2.05  # what the turns are there for


def test_no_region_always_follows_the_same() -> None:
    clock = FakeClock()
    ran: list[str] = []

    def region(name: str) -> Region:
        def run() -> None:
            clock.now += 1e-3
            if not ran or ran[-1] != name:
                ran.append(name)

        return run

    measure_in_turns([region(name) for name in "abcd"], HostStopwatch(clock=clock), Budget(100, min_repeats=50))
    followed = set(itertools.pairwise(ran))
    assert len(followed) > 8  # of 12


def test_drift_is_the_last_fifth_over_the_first() -> None:
    assert Timing.of([1.0] * 10 + [3.0] * 30 + [2.0] * 10).drift == pytest.approx(2)
    assert Timing.of([4.0, 4.0]).drift == 1
