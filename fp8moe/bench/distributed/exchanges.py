"""Transports that take the place of the real one: to see what travels, and what is left where nothing does."""

from collections.abc import Sequence

from torch import Tensor

from fp8moe.distributed import Exchange


class Recording:
    """Sends by another transport, and keeps what came.

    Args:
        exchange: the other.
        rank: this one's number, whose own rows go nowhere.
    """

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self._exchange, self._rank = exchange, rank
        self.received: list[Tensor] = []
        """What each call returned."""
        self.bytes_sent = 0
        """Of all calls, to other ranks."""

    @property
    def num_ranks(self) -> int:
        """As in `Exchange`."""
        return self._exchange.num_ranks

    def rows(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """As in `Exchange`."""
        self.bytes_sent += (sum(sent) - sent[self._rank]) * x.shape[1] * x.element_size()
        came = self._exchange.rows(x, sent, received)
        self.received.append(came.detach())  # of its own: a gradient's graph may begin at what is returned
        return came


class Replay:
    """Sends nothing, and returns what came in a recorded step, call by call: later steps run without their wire."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._calls = recording, 0

    @property
    def num_ranks(self) -> int:
        """As in `Exchange`."""
        return self._recording.num_ranks

    def rows(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """As in `Exchange`."""
        found = self._recording.received
        self._calls += 1
        return found[(self._calls - 1) % len(found)].detach()
