"""Fixtures of the tests on a GPU."""

import pytest

from fp8moe import FP8Config, KernelPreference
from tests.gpu.support import lacks


@pytest.fixture(params=[KernelPreference.DEEPGEMM, KernelPreference.TRITON], ids=lambda preference: preference.value)
def config(request: pytest.FixtureRequest) -> FP8Config:
    """Each FP8 backend; the test is skipped where it cannot be used."""
    reasons = lacks(request.param)
    if reasons:
        pytest.skip(reasons)
    return FP8Config(kernel_preference=request.param)
