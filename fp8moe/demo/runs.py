"""A run on disk. Every file is replaced whole or appended to line by line, so a run is usable wherever it stopped.

runs/<name>/config.json                  what the run is
runs/<name>/<precision>/metrics.jsonl    a `StepRecord` a line
runs/<name>/<precision>/checkpoint.pt    the state after the last line, or after an earlier one
runs/<name>/<precision>/sample.txt       what the trained model writes
runs/<name>/summary.json, loss.png       both precisions side by side
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import python_version
from typing import IO, Any

import torch

from fp8moe.demo.settings import Precision, RunConfig
from fp8moe.demo.training import StepRecord

_NUMBERED = re.compile(r"run-(\d+)")


@dataclass(frozen=True)
class Run:
    """The directory of a run and its configuration."""

    path: Path
    config: RunConfig
    data_sha256: str

    @classmethod
    def create(cls, output_dir: Path, name: str | None, config: RunConfig, data_sha256: str) -> "Run":
        """A new directory, `run-N` if `name` is None, with the configuration in it.

        Raises:
            ValueError: `name` is taken or no plain name, or the directory cannot be made.
        """
        if name is not None and (Path(name).name != name or name in ("", "..")):
            raise ValueError(f"name is {name!r}; it must be a plain name: --output-dir says where")
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            path = _new_numbered(output_dir) if name is None else _new_named(output_dir, name)
        except OSError as error:
            raise ValueError(f"--output-dir {output_dir}: {error.strerror}; pass another directory") from error
        run = cls(path, config, data_sha256)
        facts = {"data_sha256": data_sha256, "torch": torch.__version__, "python": python_version()}
        run._write_json("config.json", {"config": config.to_json(), **facts})
        return run

    @classmethod
    def open(cls, output_dir: Path, name: str) -> "Run":
        """The run in the directory `name`, or in `output_dir / name`.

        Raises:
            ValueError: neither holds a run that this version can read.
        """
        for path in (Path(name), output_dir / name):
            file = path / "config.json"
            if file.is_file():
                try:
                    saved = json.loads(file.read_text())
                    return cls(path, RunConfig.from_json(saved["config"]), saved["data_sha256"])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{file} is not the configuration of a run ({error}): start a new run") from error
        present = sorted(file.parent.name for file in output_dir.glob("*/config.json"))
        choices = f"{output_dir} has {', '.join(present)}" if present else f"there are no runs in {output_dir}"
        raise ValueError(f"--resume {name}: no run is there; {choices}")

    def file(self, precision: Precision, name: str) -> Path:
        return self.path / precision / name

    @contextmanager
    def replacing(self, *name: str) -> Iterator[IO[bytes]]:
        """A stream whose contents become the file in one move at the end: a reader sees the old file or the new one."""
        file = self.path.joinpath(*name)
        temporary = file.with_name(f"{file.name}.tmp")
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    def records(self, precision: Precision) -> list[StepRecord]:
        """The steps recorded so far. A last line that was cut off in the writing is left out."""
        file = self.file(precision, "metrics.jsonl")
        if not file.exists():
            return []
        lines = file.read_text().split("\n")[:-1]  # what follows the last newline was cut off
        return [StepRecord(**json.loads(line)) for line in lines]

    @contextmanager
    def recorder(self, precision: Precision, step: int) -> Iterator[Callable[[StepRecord], None]]:
        """A function that appends a record to the metrics. Records past `step` are dropped: those steps run again."""
        file = self.file(precision, "metrics.jsonl")
        file.parent.mkdir(exist_ok=True)
        kept = [record for record in self.records(precision) if record.step <= step]
        with self.replacing(precision, "metrics.jsonl") as stream:
            stream.write("".join(map(_line, kept)).encode())
        with file.open("a", buffering=1) as lines:
            yield lambda record: print(_line(record), end="", file=lines)

    def save_checkpoint(self, precision: Precision, state: dict[str, Any]) -> None:
        with self.replacing(precision, "checkpoint.pt") as stream:
            torch.save(state, stream)

    def load_checkpoint(self, precision: Precision) -> dict[str, Any] | None:
        """The state saved last, on the CPU; None if there is none."""
        file = self.file(precision, "checkpoint.pt")
        if not file.exists():
            return None
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json("summary.json", summary)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with self.replacing(name) as stream:
            stream.write(f"{json.dumps(value, indent=2)}\n".encode())


def _new_named(output_dir: Path, name: str) -> Path:
    path = output_dir / name
    try:
        path.mkdir()
    except FileExistsError:
        raise ValueError(f"{path} is there already: continue it with --resume {path}, or pass another --name") from None
    return path


def _new_numbered(output_dir: Path) -> Path:
    """Make the next free `run-N`."""
    numbers = (int(match[1]) for path in output_dir.iterdir() if (match := _NUMBERED.fullmatch(path.name)))
    number = max(numbers, default=0) + 1
    while True:
        path = output_dir / f"run-{number}"
        try:
            path.mkdir()
        except FileExistsError:  # another run took the number just now
            number += 1
        else:
            return path


def _line(record: StepRecord) -> str:
    fields = asdict(record)
    if record.val_loss is None:
        del fields["val_loss"]
    return f"{json.dumps(fields)}\n"
