"""What is measured of one layer on several ranks."""

from dataclasses import dataclass

from fp8moe.bench.figures import Failure
from fp8moe.bench.shapes import Balance, Shape
from fp8moe.bench.timing import Timing


@dataclass(frozen=True)
class WayFigures:
    """Of one way to compute the layer. Each time is of the slowest rank."""

    name: str
    computed_by: str
    sqnr_db: dict[str, float]
    """Against the plain layer, of the output and each gradient: the least of all ranks."""
    forward: Timing
    """As in training: with what backward needs made and saved."""
    backward: Timing
    """Right after forward."""
    both: Timing
    without_wire: Timing
    """The same step, with what arrives there already."""
    sent_bytes: int
    """To other ranks in forward and backward, of the rank that sends most."""
    graph: Timing | None
    """`both` replayed from a CUDA graph, where the host never waits."""
    graph_without_wire: Timing | None
    """Likewise, `without_wire`: what the device takes, whatever the host does."""
    no_graph_because: str | None
    host_us: float | None
    """Microseconds until forward and backward return to the caller, in a loop that runs ahead of the device; None on a
    CPU, and where the host waits."""
    peak_bytes: int | None
    """Above what was held before, of the rank that holds most; None on a CPU."""
    speed_against_bf16: float
    """The plain layer's time for forward and backward over this one's."""
    wire_ms: float | None
    """What its exchanges of rows take alone; None if the wire was not measured."""

    @property
    def exposed_ms(self) -> float:
        """What the wire adds to the step."""
        return self.both.median_ms - self.without_wire.median_ms

    @property
    def communication(self) -> float:
        """That, as a share of the step."""
        return self.exposed_ms / self.both.median_ms

    @property
    def overlap(self) -> float | None:
        """The share of the wire's own time that the step hides; None if that was not measured."""
        return None if not self.wire_ms else 1 - self.exposed_ms / self.wire_ms


@dataclass(frozen=True)
class AloneFigures:
    """Of the experts alone, on the rows that arrive."""

    name: str
    both: Timing


@dataclass(frozen=True)
class WireFigures:
    """Of one collective."""

    name: str
    timing: Timing
    sent_bytes: int
    """To other ranks, of the rank that sends most. (In a ring of an all-gather each passes on as many.)"""
    gb_s: float
    """1e9 of these bytes a second."""
    speed_against_bf16: float
    """The time of the same in BF16 over this one's."""


@dataclass(frozen=True)
class ShapeFigures:
    """All that was measured of one shape."""

    shape: Shape
    routing: Balance
    rows_of_ranks: list[int]
    """Of all choices, how many each rank's experts compute."""
    tokens_sent: float
    """To how many ranks a token travels on average, its own included."""
    bf16: WayFigures | None
    """The plain layer; None if layers were not measured."""
    variants: list[WayFigures | Failure]
    alone: list[AloneFigures]
    wire: list[WireFigures]

    @property
    def no_graphs(self) -> dict[str, str]:
        """Why a way whose host never waits has no graph time, by its name."""
        ways = [way for way in self.variants if isinstance(way, WayFigures) and way.host_us is not None]
        return {way.name: way.no_graph_because for way in ways if way.no_graph_because}

    @property
    def failures(self) -> list[Failure]:
        """The ways that have no figures."""
        return [row for row in self.variants if isinstance(row, Failure)]
