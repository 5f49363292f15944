"""What a run leaves behind: every figure, and where and how it was measured, as JSON."""

import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fp8moe.bench.ceilings import Ceilings
from fp8moe.bench.figures import Result
from fp8moe.bench.shapes import Shape

FORMAT = 5
"""Raised when a field changes its meaning."""
PACKAGES = ("fp8moe", "torch", "triton", "transformers", "torchao", "liger-kernel", "sgl-deep-gemm")


@dataclass(frozen=True)
class Environment:
    """Where a run took place."""

    device: str
    """The name of the GPU, or of the processor's architecture."""
    packages: dict[str, str | None]
    """Versions of what is installed as a package; None of what is not."""

    @property
    def versions(self) -> str:
        """Of what is installed, to be printed."""
        return ", ".join(f"{package} {version}" for package, version in self.packages.items() if version)


@dataclass(frozen=True)
class Report:
    """One run."""

    what: str
    """The name of the task."""
    command: str
    date: str
    """ISO 8601, when the run started."""
    environment: Environment
    ceilings: Ceilings
    problems: list[Result]


def environment_of(device: torch.device) -> Environment:
    """Describe the machine and what is installed on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return Environment(name, {package: _version(package) for package in PACKAGES})


def write_json(report: Report, path: Path) -> None:
    """Write all of `report`, with times in ms, rates in 1e9 and 1e12 a second."""
    document: dict[str, Any] = {"format": FORMAT, **asdict(report)}
    for written, problem in zip(document["problems"], report.problems, strict=True):
        written["shape"] = shape_document(problem.shape)
        written["routing"] = problem.routing.value
    write_document(document, path)


def document_of(
    format_number: int, what: str, environment: Environment, *, launch: str = "python -m fp8moe", **figures: Any
) -> dict[str, Any]:
    """What each file of figures begins with, then `figures`. `launch` is the command before its arguments."""
    return {
        "format": format_number,
        "what": what,
        "command": f"{launch} {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": asdict(environment),
        **figures,
    }


def write_document(document: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def shape_document(shape: Shape) -> dict[str, Any]:
    """The sizes by their letters, and the name."""
    return {**dict(zip(shape.letters.lower(), shape.sizes, strict=True)), "name": shape.name}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
