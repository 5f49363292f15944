"""What a run leaves behind: every figure, and where and how it was measured, as JSON."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fp8moe.bench.ceilings import Ceilings
from fp8moe.bench.measure import Result

FORMAT = 3
"""Raised when a field changes its meaning."""
PACKAGES = ("fp8moe", "torch", "triton", "torchao", "liger-kernel", "sgl-deep-gemm")


@dataclass(frozen=True)
class Environment:
    """Where a run took place."""

    device: str
    """The name of the GPU, or of the processor's architecture."""
    driver: str | None
    """NVIDIA's; None on a CPU, or where nvidia-smi does not tell."""
    cuda: str | None
    """What torch was built with."""
    python: str
    packages: dict[str, str | None]
    """Versions of what is installed as a package; None of what is not."""


@dataclass(frozen=True)
class Report:
    """One run."""

    what: str
    """The name of the task."""
    command: str
    date: str
    """ISO 8601, when the run started."""
    seed: int
    dtype: str
    environment: Environment
    ceilings: Ceilings
    problems: list[Result]


def environment_of(device: torch.device) -> Environment:
    """Describe the machine and what is installed on it."""
    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        driver=_driver_version() if on_gpu else None,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        packages={package: _version(package) for package in PACKAGES},
    )


def write_json(report: Report, path: Path) -> None:
    """Write all of `report`, with times in ms, rates in 1e9 and 1e12 a second."""
    document: dict[str, Any] = {"format": FORMAT, **asdict(report)}
    for written, problem in zip(document["problems"], report.problems, strict=True):
        shape = problem.shape
        sizes = {letter.lower(): size for letter, size in zip(shape.letters, shape.sizes, strict=True)}
        written |= {"shape": {**sizes, "name": shape.name}, "routing": problem.routing.value}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else None
