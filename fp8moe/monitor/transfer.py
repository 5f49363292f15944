"""From the device to the host without waiting."""

from collections.abc import Callable

import torch
from torch import Tensor


class Shipment:
    """A tensor on its way to the host.

    Args:
        values: flat, on any device; nobody writes to them any more.
        unpack: called with them, when they are there.
    """

    def __init__(self, values: Tensor, unpack: Callable[[Tensor], None]) -> None:
        self._host, self._unpack = values, unpack
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def is_here(self) -> bool:
        """Whether it has arrived."""
        return self._event is None or self._event.query()

    def receive(self) -> None:
        """Unpack it, which waits for it."""
        if self._event is not None:
            self._event.synchronize()
        self._unpack(self._host)
