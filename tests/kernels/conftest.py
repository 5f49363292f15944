"""Kernel tests launch the Triton kernels directly, whatever the device."""

import importlib.util

from tests import conftest, exact_interpreter

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_*.py")  # Triton has no build for this system
elif not conftest.HAS_GPU:
    exact_interpreter.install()
