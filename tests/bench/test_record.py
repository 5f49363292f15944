"""Where a run took place is written down."""

import subprocess

import pytest
import torch

from fp8moe.bench import record
from fp8moe.bench.record import environment_of


def test_environment_of_a_cpu() -> None:
    environment = environment_of(torch.device("cpu"))
    assert environment.device.startswith("CPU (")
    assert environment.driver is None
    assert environment.packages["torch"] is not None
    assert set(environment.packages) == {"fp8moe", "torch", "triton", "torchao", "liger-kernel", "sgl-deep-gemm"}


def test_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    status = 0

    def answer(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status, stdout="580.1.2\n580.1.2\n")

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("subprocess.run", answer)
    assert record._driver_version() == "580.1.2"
    status = 9
    assert record._driver_version() is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert record._driver_version() is None
