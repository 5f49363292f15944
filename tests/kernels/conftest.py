"""Kernel tests launch the Triton kernels directly, whatever the device."""

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

from tests import conftest, exact_interpreter

if not conftest.HAS_GPU:
    exact_interpreter.install()
