"""From the device to the host without waiting."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CAPACITY = 4096
"""Results in a log before it is sent."""


class Shipment:
    """Tensors on their way to the host.

    Args:
        values: of any shapes and dtypes that fp64 holds, on one device; they may be written to again afterwards.
        unpack: called with them, when they are there, as fp64 tensors on the host, flat.
    """

    def __init__(self, values: list[Tensor], unpack: Callable[[list[Tensor]], None]) -> None:
        self._sizes, self._unpack = [value.numel() for value in values], unpack
        flat = torch.cat([value.flatten().double() for value in values])
        self._event: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flat.device))
        else:
            self._host = flat

    @property
    def is_here(self) -> bool:
        """Whether it has arrived."""
        return self._event is None or self._event.query()

    def receive(self) -> None:
        """Unpack it, which waits for it."""
        if self._event is not None:
            self._event.synchronize()
        self._unpack([*self._host.split(self._sizes)])


@dataclass(frozen=True)
class Entry:
    """What a log knows of one result."""

    step: int
    layer: str
    name: str


class Log:
    """Whether results were finite, in the order in which they were made, on one device.

    Each is one sum in fp32, written where the next one is due: one launch. A sum of finite values that passes what fp32
    holds counts as not finite too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._entries = device, list[Entry]()
        self._sums = torch.zeros(CAPACITY, device=device)

    def add(self, entry: Entry, x: Tensor) -> None:
        """Note whether `x` `(rows, columns)` is finite."""
        torch.sum(x, dim=(0, 1), dtype=torch.float32, out=self._sums[len(self._entries)])
        self._entries.append(entry)

    @property
    def is_full(self) -> bool:
        """Whether it must be sent before the next `add`."""
        return len(self._entries) == CAPACITY

    def send(self, report: Callable[[list[Entry]], None]) -> Shipment | None:
        """Send what has been noted, and begin anew. `report` will be called with what was not finite."""
        if not self._entries:
            return None
        entries, sums = self._entries, self._sums[: len(self._entries)]
        self._entries = []

        def unpack(values: list[Tensor]) -> None:
            is_finite = values[0].isfinite().tolist()
            report([entry for entry, finite in zip(entries, is_finite, strict=True) if not finite])

        return Shipment([sums], unpack)
