"""The int8 kernels compile ahead of time, without a GPU, for those without FP8: NVIDIA's, and AMD's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = {"cuda:80": 163 * 1024, "cuda:89": 99 * 1024, "hip:gfx90a": 64 * 1024, "hip:gfx942": 64 * 1024}
EVERY = {"cuda:80": 7, "cuda:89": 11, "hip:gfx90a": 17, "hip:gfx942": 13}
"""Of so many variants one is compiled: all of them take a minute."""


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_compiles(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.kernels.compile_int8", target, str(EVERY[target])]
    run = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} >= {"quantize_rows_kernel", "int8_grouped_mm_kernel"}
    for row in rows:
        assert row["shared"] <= SHARED_BYTES[target], row
        assert row.get("local", 0) == 0, row
        if "mm" in row["kernel"]:
            assert row.get("mfma", 1) > 0, row  # the matrix unit computes it
