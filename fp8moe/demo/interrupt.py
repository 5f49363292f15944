"""Ctrl-C and SIGTERM as a request that training answers between two steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Handles signals: the first one sets `requested`, the next one raises `KeyboardInterrupt` at once."""

    requested = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through sys.stderr: the signal may have come while it was being written to.
        os.write(2, b"\nstopping after this step; once more stops at once\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While entered, SIGINT and SIGTERM go to the `StopRequest`."""
    stop = StopRequest()
    previous = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
