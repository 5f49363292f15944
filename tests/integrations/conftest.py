"""Set-up for the integrations' tests."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _as_imported() -> Iterator[None]:
    """Every test finds the defaults, and no class that has been warned of."""
    hf = sys.modules.get("fp8moe.integrations.transformers")
    if hf is not None:
        hf._warned.clear()
    yield
    if hf is not None:
        hf.register()
