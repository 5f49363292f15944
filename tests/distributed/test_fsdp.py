"""FSDP2 of fp8moe's experts on several ranks, gathered in high precision and in FP8."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.distributed.fsdp_cases import CASES
from tests.distributed.ranks import failures_of

Failures = Callable[[int], list[dict[str, str]]]


def counts_of(name: str) -> tuple[int, ...]:
    return getattr(CASES[name], "counts", (2, 4))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """What failed on each rank, of as many ranks."""

    @cache
    def of(count: int) -> list[dict[str, str]]:
        return failures_of(count, tmp_path_factory.mktemp("ranks"), "tests.distributed.fsdp_cases")

    return of


@pytest.mark.parametrize(
    ("case", "count"), [(name, count) for count in (1, 2, 4) for name in CASES if count in counts_of(name)]
)
def test_ranks(failures: Failures, case: str, count: int) -> None:
    for rank, failed in enumerate(failures(count)):
        assert case not in failed, f"on rank {rank}: {failed[case]}"
