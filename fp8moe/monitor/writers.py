"""Where readings go by themselves. A writer is anything that is called with a reading."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from fp8moe.monitor.reading import Reading


class JsonLines:
    """Appends each reading to a file, one line of JSON each (`Reading.as_json`).

    Args:
        path: of the file; it is made, and its folder too, with the first reading.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)

    def __call__(self, reading: Reading) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as lines:
            lines.write(f"{json.dumps(reading.as_json())}\n")


class TensorBoard:
    """Writes each number of a reading (`Reading.as_dict`) as a scalar, and the rows per expert as a histogram.

    Args:
        where: a folder, or a `SummaryWriter` that the training loop has already.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, where: Any) -> None:
        if not isinstance(where, str | PathLike):
            self._writer = where
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"fp8moe.monitor.TensorBoard needs tensorboard ({error}): pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(where))

    def __call__(self, reading: Reading) -> None:
        for name, value in reading.as_dict().items():
            self._writer.add_scalar(name, value, reading.step)
        for name, layer in reading.layers.items():
            if layer.tokens_per_expert:
                import numpy

                counts = numpy.asarray(layer.tokens_per_expert)
                self._writer.add_histogram(f"{name}/experts/rows", counts, reading.step)
        for alert in reading.alerts:
            self._writer.add_text("monitor/alerts", alert.message, reading.step)
        self._writer.flush()
