"""How many processes `make` runs the tests in."""

import pytest

from tests.workers import MAX_WORKERS, options


@pytest.mark.parametrize(("processors", "workers"), [(2, 2), (8, 8), (128, MAX_WORKERS)])
def test_one_for_each_processor_while_memory_lasts(processors: int, workers: int) -> None:
    assert options(processors, has_xdist=True) == f"-n {workers} --dist worksteal"


@pytest.mark.parametrize(("processors", "has_xdist"), [(1, True), (16, False)])
def test_without_a_second_processor_or_xdist_pytest_runs_as_ever(processors: int, has_xdist: bool) -> None:
    assert options(processors, has_xdist) == ""
