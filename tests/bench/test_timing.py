"""Medians of a clock that the test turns."""

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fp8moe.bench import timing as timing_module
from fp8moe.bench.timing import (
    Budget,
    CudaStopwatch,
    HostStopwatch,
    Laps,
    Region,
    Timing,
    host_microseconds,
    measure,
    measure_in_turns,
    ready,
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


def test_laps_are_the_time_of_each_stage_of_each_run() -> None:
    clock = FakeClock()
    stopwatch = HostStopwatch(clock=clock)
    assert stopwatch.laps([Work(clock, [3, 1, 2])], 3) == [pytest.approx((each,)) for each in (3, 1, 2)]

    def second(first: str) -> str:
        clock.now += {"one": 5e-3}[first]
        return "two"

    def first() -> str:
        clock.now += 2e-3
        return "one"

    assert stopwatch.laps([first, second], 2) == [pytest.approx((2, 5))] * 2


def test_what_a_run_makes_is_gone_before_the_next() -> None:
    class Made:
        pass

    alive: list[weakref.ref[Made]] = []

    def make() -> Made:
        assert all(made() is None for made in alive)
        made = Made()
        alive.append(weakref.ref(made))
        return made

    HostStopwatch().laps([make], 3)
    assert len(alive) == 3


def test_median_leaves_out_warm_up_and_outliers() -> None:
    clock = FakeClock()
    warm_up = [5000, 2, 2, 50, 50]
    repetitions = [[70, 1, 1, 1], [70, 2, 2, 900], [70, 3, 3, 3]]
    work = Work(clock, [*warm_up, *(milliseconds for each in repetitions for milliseconds in each)])
    budget = Budget(18, repetitions=3, min_runs=1, max_runs=99)  # 18 ms / 2 ms / 3: 3 runs
    timing = measure(work, HostStopwatch(clock=clock), budget)
    assert (timing.median_ms, timing.min_ms, timing.max_ms) == pytest.approx((2, 1, 3))
    assert timing.spread == pytest.approx(1)
    assert work.runs == 17


def test_the_whole_of_a_run_is_the_sum_of_its_stages() -> None:
    laps = Laps([[(1.0, 5.0), (2.0, 6.0), (3.0, 1.0)], [(4.0, 4.0)]])
    assert laps.stage(0) == Timing(3, 2, 4)
    assert laps.stage(1) == Timing(4.5, 4, 5)
    assert laps.whole() == Timing(7, 6, 8)


@pytest.mark.parametrize(("run_ms", "runs"), [(1.0, 10), (1000.0, 3), (1e-9, 40), (0.0, 40)])
def test_budget_is_kept_within_bounds(run_ms: float, runs: int) -> None:
    assert Budget(30, repetitions=3).runs(run_ms) == runs


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
    assert stopwatch.laps([Work(clock, [3, 1, 2])], 3) == [pytest.approx((each,)) for each in (3, 1, 2)]
    assert waits == [pytest.approx(3000.006)]
    patient = CudaStopwatch(torch.device("cpu"), flushes=4)
    monkeypatch.setattr(patient, "_flush", Flush())
    assert patient.laps([Work(clock, [3]), lambda _: Work(clock, [1])()], 1) == [pytest.approx((3, 1))]
    assert waits[1] == pytest.approx(3000.006 + 4000.004)


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

    budget = Budget(200, repetitions=25, min_runs=2, max_runs=2)
    regions = [Slowing(1), Slowing(2)]
    one, other = measure_in_turns([ready(region) for region in regions], HostStopwatch(clock=clock), budget)
    assert other.whole().median_ms / one.whole().median_ms == pytest.approx(2, rel=0.02)
    alone = [measure(region, HostStopwatch(clock=clock), budget).median_ms for region in regions]
    assert alone[1] / alone[0] > 2.05  # what the turns are there for


def test_no_region_always_follows_the_same() -> None:
    orders: list[list[str]] = []
    for _ in range(2):
        ran: list[str] = []
        regions = [partial(ran.append, name) for name in "abcd"]
        budget = Budget(1, repetitions=8, min_runs=2, max_runs=2)
        measure_in_turns([ready(region) for region in regions], HostStopwatch(), budget)
        orders.append([name for name, _ in itertools.groupby(ran)])
    followed = set(itertools.pairwise(orders[0]))
    assert len(followed) > 8  # of 12
    assert orders[0] == orders[1]


def test_what_is_timed_is_made_ready_for_each_repetition_and_given_back() -> None:
    class Stage:
        def __call__(self) -> None:
            pass

    uses: list[weakref.ref[Stage]] = []

    @contextmanager
    def set_up(name: str) -> Iterator[list[Region]]:
        assert all(stage() is None for stage in uses)
        stage = Stage()
        uses.append(weakref.ref(stage))
        yield [stage]

    measure_in_turns([partial(set_up, name) for name in "ab"], HostStopwatch(), Budget(1, repetitions=3, max_runs=3))
    assert len(uses) == 2 * (1 + 3)
