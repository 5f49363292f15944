"""Every kernel compiles for sm_90 ahead of time, without a GPU, and spills nothing."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import triton

MAX_SHARED_BYTES = 227 * 1024

SPILLS_ARE_FEW = (
    {"quantize_swiglu_backward_hopper_kernel", "quantize_long_tiles_hopper_kernel"}
    if triton.__version__ >= "3.8"
    else set()
)
"""Kernels that a newer ptxas compiles with a few loop invariants on the stack."""


def allowed_stack(row: dict[str, Any]) -> int:
    """Bytes a thread."""
    if row["kernel"] in SPILLS_ARE_FEW:
        return 160
    if row["kernel"] == "int8_grouped_mm_kernel" and ", 128 rows," in row["variant"]:
        return 16  # four warps of which a thread has 192 sums: that is fastest
    if row["kernel"] == "int8_grouped_mm_kernel" and "72 x 200" in row["variant"]:
        return 16  # with Triton 3.6: sizes that no model has, every tile of which is masked
    # Loop invariants of rare variants. What training compiles keeps nothing there: features that are no padding, with
    # the gradient of the row weights.
    is_rare = "from codes" in row["variant"] and ("sums=False" in row["variant"] or "200 features" in row["variant"])
    return 16 if row["kernel"] == "quantize_swiglu_backward_hopper_kernel" and is_rare else 0


@pytest.fixture(scope="module")
def printed() -> list[dict[str, Any]]:
    """By as many processes as there are processors: compiling takes one of them some minutes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root, shares = Path(__file__).parent.parent.parent, os.cpu_count() or 1
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_for_hopper", f"{share}/{shares}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root,
        )
        for share in range(shares)
    ]  # fmt: skip
    lines = []
    with ThreadPoolExecutor(shares) as readers:
        for process, (out, err) in zip(processes, readers.map(subprocess.Popen.communicate, processes), strict=True):
            assert process.returncode == 0, err
            lines += out.splitlines()
    return [json.loads(line) for line in lines]


def test_no_kernel_is_missed_or_spills_or_outgrows_a_hopper_block(printed: list[dict[str, Any]]) -> None:
    (package,) = (row["package"] for row in printed if "package" in row)
    compiled = [row for row in printed if "kernel" in row]
    assert {row["kernel"] for row in compiled} == set(package)
    assert {"m_grouped_kernel", "wgrad_kernel", "quantize_activation_kernel"} <= set(package)
    for row in compiled:
        assert row["local"] == 0, row
        assert row["stack"] <= allowed_stack(row), row
        assert 0 < row["reg"] <= 255, row
        assert row["shared"] <= MAX_SHARED_BYTES, row
