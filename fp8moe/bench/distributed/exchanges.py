"""Transports that take the place of the real one: to see what travels, and what is left where nothing does."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fp8moe.distributed import Arrival, Exchange


class Recording:
    """Sends by another transport, and keeps what came.

    Args:
        exchange: the other.
        rank: this one's number, whose own rows go nowhere.
    """

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self._exchange, self._rank = exchange, rank
        self.arrivals: list[Arrived] = []
        """Of each call."""
        self.bytes_sent = 0
        """Of all calls, to other ranks."""

    @property
    def num_ranks(self) -> int:
        """As in `Exchange`."""
        return self._exchange.num_ranks

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        """As in `Exchange`."""
        self.bytes_sent += (sum(sent) - sent[self._rank]) * x.shape[1] * x.element_size()
        self.arrivals.append(Arrived(self._exchange.send(x, sent, received)))
        return self.arrivals[-1]


@dataclass
class Arrived:
    """What came of a call, which may be asked for again."""

    _arrival: Arrival
    _rows: Tensor | None = None

    def wait(self) -> Tensor:
        """As in `Arrival`."""
        if self._rows is None:
            self._rows = self._arrival.wait()
        return self._rows.detach()  # a tensor of its own: a gradient's graph may begin at it


class Replay:
    """Sends nothing, and returns what came in a recorded step, call by call: later steps run without their wire."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._calls = recording, 0

    @property
    def num_ranks(self) -> int:
        """As in `Exchange`."""
        return self._recording.num_ranks

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        """As in `Exchange`."""
        arrivals = self._recording.arrivals
        self._calls += 1
        return arrivals[(self._calls - 1) % len(arrivals)]
