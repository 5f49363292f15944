"""From a shape to figures: every way is checked on all ranks, then all are timed by turns."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from fp8moe.bench.distributed.exchanges import Recording, Replay
from fp8moe.bench.distributed.figures import AloneFigures, ShapeFigures, WayFigures, WireFigures
from fp8moe.bench.distributed.plain import plain_experts, plain_layer
from fp8moe.bench.distributed.problem import RankProblem, draw_arrived_rows, draw_rank_problem
from fp8moe.bench.distributed.ranks import Ranks
from fp8moe.bench.distributed.ways import MIN_SQNR_DB, Way, experts_alone, ways_of
from fp8moe.bench.distributed.wire import measure_wire, wire_ms
from fp8moe.bench.figures import Failure
from fp8moe.bench.graphs import replaying
from fp8moe.bench.measure import check_variant
from fp8moe.bench.memory import peak_bytes
from fp8moe.bench.problem import Op, Problem, Products
from fp8moe.bench.shapes import Balance, Shape
from fp8moe.bench.timing import Budget, Laps, Stages, Stopwatch, host_microseconds, measure_in_turns, ready
from fp8moe.bench.variants import Variant, describe_backends
from fp8moe.config import FP8Config
from fp8moe.distributed import Exchange
from fp8moe.gemm.explain import explain


@dataclass(frozen=True)
class Site:
    """Where and how everything is measured."""

    ranks: Ranks
    exchange: Exchange
    stopwatch: Stopwatch
    layer_budget: Budget
    """For each way, with and without its wire."""
    wire_budget: Budget
    """For each collective."""


def measure_shape(shape: Shape, balance: Balance, site: Site, *, layers: bool, wire: bool) -> ShapeFigures:
    """Draw one problem, and measure what is asked for: the layers, the wire."""
    ranks = site.ranks
    drawn = draw_rank_problem(shape, balance, ranks)
    on_wire = measure_wire(shape, drawn, ranks, site.exchange, site.stopwatch, site.wire_budget) if wire else []
    rows: list[WayFigures | Failure] = []
    alone: list[AloneFigures] = []
    if layers:
        rows, alone = _measure_ways(shape, drawn, site, on_wire)
    plain = rows.pop(0) if rows else None
    if isinstance(plain, Failure):
        raise RuntimeError(f"the plain layer, which everything is compared with, failed: {plain.error}")
    return ShapeFigures(
        shape=shape,
        routing=balance,
        rows_of_ranks=[sum(drawn.group_sizes(rank)) for rank in range(ranks.count)],
        tokens_sent=float(drawn.rows_sent(once=True).sum()) / (ranks.count * shape["T"]),
        bf16=plain,
        variants=rows,
        alone=alone,
        wire=on_wire,
    )


def _measure_ways(
    shape: Shape, drawn: RankProblem, site: Site, wire: Sequence[WireFigures]
) -> tuple[list[WayFigures | Failure], list[AloneFigures]]:
    ranks, problem = site.ranks, drawn.problem
    if ranks.device.type == "cuda":
        torch.compiler.reset()  # what was compiled for an earlier shape counts towards a limit
    expected = problem.products(plain_layer(site.exchange))
    ways = ways_of(shape, drawn, ranks.device)
    checked = [_agreed(way, ranks, partial(_check, way, problem, expected, site)) for way in ways]
    del expected
    timed = [way for way, found in zip(ways, checked, strict=True) if not isinstance(found, Failure)]
    no_graph = {way.name: _why_no_graph(way, problem, site) for way in timed}
    in_graph = [way for way in timed if no_graph[way.name] is None]
    arrived, alone_ops = draw_arrived_rows(shape, drawn, ranks), experts_alone(ranks.device)
    if arrived.group_sizes != [0] * len(arrived.group_sizes):
        _check_alone(alone_ops, arrived)
    laps = iter(
        measure_in_turns(
            [partial(_in_use, way, problem, site) for way in timed]
            + [partial(_without_wire, way, problem, site) for way in timed]
            + [partial(_in_graph, _in_use, way, problem, site) for way in in_graph]
            + [partial(_in_graph, _without_wire, way, problem, site) for way in in_graph]
            + [ready(partial(arrived.forward, op), arrived.backward) for op in alone_ops.values()],
            site.stopwatch,
            site.layer_budget,
        )
    )
    of_ways = [{way.name: next(laps) for way in each} for each in (timed, timed, in_graph, in_graph)]
    rows = [
        found if isinstance(found, Failure)
        else _figures(way, found, of_ways, no_graph[way.name], problem, site, wire)
        for way, found in zip(ways, checked, strict=True)
    ]  # fmt: skip
    return rows, [AloneFigures(name, next(laps).whole()) for name in alone_ops]


def _figures(
    way: Way, sqnr_db: dict[str, float], of_ways: Sequence[Mapping[str, Laps]], no_graph_because: str | None,
    problem: Problem, site: Site, wire: Sequence[WireFigures],
) -> WayFigures:  # fmt: skip
    """`of_ways` are the laps by the names of the ways: as they are, without the wire, and both in graphs."""
    whole, without, *graphs = of_ways
    laps, device = whole[way.name], site.ranks.device
    graph, graph_without_wire = (found[way.name].whole() if way.name in found else None for found in graphs)
    step = partial(problem.products, way.over(site.exchange))
    host_us = None if way.reads_host or device.type != "cuda" else host_microseconds(step, device)
    recording = Recording(site.exchange, site.ranks.rank)
    problem.products(way.over(recording))
    most = torch.tensor([recording.bytes_sent, peak_bytes(step, device) or 0])
    way.release()
    sent, peak = site.ranks.gathered(most).amax(0).tolist()
    both, plain = laps.whole(), next(iter(whole.values())).whole()
    return WayFigures(
        name=way.name,
        computed_by=_computed_by(way, device),
        sqnr_db=sqnr_db,
        forward=laps.stage(0),
        backward=laps.stage(1),
        both=both,
        without_wire=without[way.name].whole(),
        sent_bytes=sent,
        graph=graph,
        graph_without_wire=graph_without_wire,
        no_graph_because=no_graph_because,
        host_us=host_us,
        peak_bytes=peak or None,
        speed_against_bf16=plain.median_ms / both.median_ms,
        wire_ms=wire_ms(way.dispatch, list(wire)),
    )


def _computed_by(way: Way, device: torch.device) -> str:
    if way.name.startswith("BF16"):
        return "BF16"
    return describe_backends(explain(device, FP8Config(allow_bf16=False)))


def _check(way: Way, problem: Problem, expected: Products, site: Site) -> dict[str, float]:
    """The SQNR of the output and each gradient on this rank."""
    variant = Variant(way.name, way.over(site.exchange), lambda out: "", way.is_ours, way.min_sqnr_db)
    try:
        return check_variant(variant, problem, expected).sqnr_db
    finally:
        way.release()


def _check_alone(ops: Mapping[str, Op], arrived: Problem) -> None:
    """That the experts alone compute what they should.

    Raises:
        WrongResultError: they do not.
    """
    expected = arrived.products(plain_experts())
    for name, op in ops.items():
        check_variant(Variant(name, op, lambda out: "", is_ours=True, min_sqnr_db=MIN_SQNR_DB), arrived, expected)


def _why_no_graph(way: Way, problem: Problem, site: Site) -> str | None:
    """Why no replay of a CUDA graph is timed; None if one can be."""
    if site.ranks.device.type != "cuda":
        return "a CPU has no CUDA graphs"
    if way.reads_host:
        return "the host waits for the device"
    error = None
    try:
        with _in_graph(_in_use, way, problem, site):
            pass
    except RuntimeError as raised:
        error = f"cannot be captured: {str(raised).splitlines()[0]}"
    return site.ranks.first_error(error)


def _agreed(way: Way, ranks: Ranks, measurement: Callable[[], dict[str, float]]) -> dict[str, float] | Failure:
    """The least that `measurement` returns on any rank, or why it returns nothing on one of them.

    What raises in the midst of a collective leaves the other ranks waiting there, until the group's timeout ends them.
    """
    found, error = {}, None
    try:
        found = measurement()
    except Exception as raised:
        if way.is_ours:
            traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    error = ranks.first_error(error)
    if error is not None:
        return Failure(way.name, way.is_ours, error)
    least = ranks.gathered(torch.tensor(list(found.values()), dtype=torch.float64)).amin(0)
    return dict(zip(found, least.tolist(), strict=True))


@contextmanager
def _in_use(way: Way, problem: Problem, site: Site) -> Iterator[Stages]:
    try:
        yield partial(problem.forward, way.over(site.exchange)), problem.backward
    finally:
        way.release()


@contextmanager
def _without_wire(way: Way, problem: Problem, site: Site) -> Iterator[Stages]:
    """The step with what a real one received."""
    recording = Recording(site.exchange, site.ranks.rank)
    try:
        problem.products(way.over(recording))
        yield partial(problem.forward, way.over(Replay(recording))), problem.backward
    finally:
        way.release()


@contextmanager
def _in_graph(
    set_up: Callable[[Way, Problem, Site], AbstractContextManager[Stages]], way: Way, problem: Problem, site: Site
) -> Iterator[Stages]:
    """The stages of `set_up`, captured as one."""
    with set_up(way, problem, site) as (forward, backward), replaying(lambda: backward(forward())) as stages:
        yield stages
