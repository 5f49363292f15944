"""A run on disk, usable wherever it stopped.

runs/<name>/config.json                  what the run is
runs/<name>/<precision>/metrics.jsonl    a `StepRecord` a line
runs/<name>/<precision>/checkpoint.pt    the state after the last line, or after an earlier one
runs/<name>/<precision>/sample.txt       what the trained model writes
runs/<name>/loss.png                     both precisions side by side
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch

from fp8moe.demo.settings import Precision, RunConfig
from fp8moe.demo.training import StepRecord


@dataclass(frozen=True)
class Run:
    """The directory of a run and its configuration."""

    path: Path
    config: RunConfig
    data_sha256: str

    @classmethod
    def create(cls, output_dir: Path, name: str | None, config: RunConfig, data_sha256: str) -> "Run":
        """A new directory, the first free `run-N` if `name` is None, with the configuration in it.

        Raises:
            ValueError: `name` is taken, or the directory cannot be made.
        """
        if name is None:
            name = next(f"run-{number}" for number in count(1) if not (output_dir / f"run-{number}").exists())
        path = output_dir / name
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            fix = f"continue it with --resume {path}, or pass another --name"
            raise ValueError(f"{path} is there already: {fix}") from None
        except OSError as error:
            raise ValueError(f"--output-dir {output_dir}: {error.strerror}; pass another directory") from error
        for precision in config.precisions:
            (path / precision).mkdir()
        saved = {"config": asdict(config), "data_sha256": data_sha256}
        (path / "config.json").write_text(f"{json.dumps(saved, indent=2)}\n")
        return cls(path, config, data_sha256)

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
                    return cls(path, RunConfig(**saved["config"]), saved["data_sha256"])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{file} is not the configuration of a run ({error}): start a new run") from error
        raise ValueError(f"{name}: no run is there, nor in {output_dir}: pass the directory of a run")

    def file(self, precision: Precision, name: str) -> Path:
        return self.path / precision / name

    def records(self, precision: Precision) -> list[StepRecord]:
        """The steps recorded so far. A last line that was cut off in the writing is left out."""
        file = self.file(precision, "metrics.jsonl")
        if not file.exists():
            return []
        lines = file.read_text().split("\n")[:-1]  # what follows the last newline was cut off
        return [json.loads(line) for line in lines]

    def append(self, precision: Precision, record: StepRecord) -> None:
        with self.file(precision, "metrics.jsonl").open("a") as lines:
            lines.write(f"{json.dumps(record)}\n")

    def rewind(self, precision: Precision, step: int) -> None:
        """Drop the records past `step`: those steps run again."""
        kept = [record for record in self.records(precision) if record["step"] <= step]
        with replacing(self.file(precision, "metrics.jsonl")) as stream:
            stream.write("".join(f"{json.dumps(record)}\n" for record in kept).encode())

    def save_checkpoint(self, precision: Precision, state: dict[str, Any]) -> None:
        with replacing(self.file(precision, "checkpoint.pt")) as stream:
            torch.save(state, stream)

    def load_checkpoint(self, precision: Precision) -> dict[str, Any] | None:
        """The state saved last, on the CPU; None if there is none."""
        file = self.file(precision, "checkpoint.pt")
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A stream whose contents become the file in one move at the end: a reader sees the old file or the new one."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
