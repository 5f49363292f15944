"""Whether results are finite: what is done in every step, and so must cost next to nothing.

Each result of a layer has a place on the device that says when it was first not finite. A check is one launch, which
writes there if it finds something; the host keeps no account of it. Now and then all places are fetched.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8moe.monitor.transfer import Shipment
from fp8moe.operands import BLOCK
from fp8moe.rows.not_finite import note_not_finite

_CHECKS_IN_STEP = 2**32


class Found(NamedTuple):
    """A result that was not finite."""

    when: int
    """Checks are numbered in the order in which they were made."""
    layer: str
    name: str

    @property
    def step(self) -> int:
        """In which it was."""
        return self.when // _CHECKS_IN_STEP


class Log:
    """Of all layers: when each result was first not finite."""

    def __init__(self) -> None:
        self._places: dict[torch.device, list[tuple[str, str, Tensor]]] = {}
        self._now = 0

    def begin(self, step: int) -> None:
        """What is checked from now on is of this step, at least 1."""
        self._now = step * _CHECKS_IN_STEP

    def tick(self) -> int:
        """The number of the check that is made now."""
        self._now += 1
        return self._now

    def place(self, layer: str, name: str, device: torch.device) -> Tensor:
        """A new one on `device`, int64 `(2,)`: of the input of a layer, and of the result."""
        first = torch.zeros(2, dtype=torch.int64, device=device)
        self._places.setdefault(device, []).append((layer, name, first))
        return first

    def send(self, report: Callable[[Found], None]) -> list[Shipment]:
        """Send what has been found so far, one shipment a device. `report` will be called with the first of each."""
        return [_shipment_of(places[:], report) for places in self._places.values()]


def _shipment_of(places: list[tuple[str, str, Tensor]], report: Callable[[Found], None]) -> Shipment:
    def unpack(values: Tensor) -> None:
        if not values.any():
            return
        pairs = zip(places, values.view(-1, 2).tolist(), strict=True)
        found = [
            Found(when, layer, name if is_result else "hidden")
            for (layer, name, _), pair in pairs
            for is_result, when in enumerate(pair)
            if when
        ]
        report(min(found, key=lambda one: one.when))  # of a check that found both, the input comes first

    return Shipment(torch.cat([first for *_, first in places]), unpack)


class Checks:
    """What looks at a call of a layer in a step that is not sampled: an `Observation` of results alone.

    It knows nothing of the single call, so there is one for all.

    Args:
        log: where to note what is not finite.
        layer: its name.
        prefix: of the names of all results.
        counts: whether forward is to be seen: not where checkpointing computes it once more.
    """

    def __init__(self, log: Log, layer: str, prefix: str, counts: bool) -> None:
        self.prefix, self.counts = prefix, counts
        self._log, self._layer = log, layer
        self._places: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def operand(self, *_: Any, **__: Any) -> None:
        """Nothing; so for all that follow."""

    weight = gate_up = d_activation = routed = operand

    def result(self, name: str, x: Tensor, *, hidden: Tensor | None = None, in_fp8: bool = True) -> None:
        """See `Observation`."""
        if not self.counts and not name.startswith("d_"):
            return
        # Of what an FP8 product returns, one element of each 128 is enough: NaN in a row fills the row, and in a weight
        # all 128 columns of its block. In what comes in, NaN may be anywhere.
        every = BLOCK if in_fp8 else 1
        both, of_result = self._places.get((name, x.get_device())) or self._new_place(name, x)
        if hidden is None:
            note_not_finite(x, every, None, 1, of_result, self._log.tick())
        else:
            note_not_finite(hidden, 1, x, every, both, self._log.tick())

    def _new_place(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self._log.place(self._layer, self.prefix + name, x.device)
        self._places[name, x.get_device()] = both, both[1:]
        return both, both[1:]
