"""FSDP2 of fp8moe's experts on several ranks, gathered in high precision and in FP8."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.multiprocessing.spawn import ProcessException, spawn

from tests.distributed.fsdp_cases import CASES
from tests.distributed.ranks import run_cases

Failures = Callable[[int], list[dict[str, str]]]


def counts_of(name: str) -> tuple[int, ...]:
    return getattr(CASES[name], "counts", (2, 4))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """What failed on each rank, of as many ranks. All cases run in one set of processes: starting these takes long."""

    @cache
    def of(count: int) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp("ranks")
        try:
            spawn(run_cases, (count, str(folder), "tests.distributed.fsdp_cases"), nprocs=count)
        except ProcessException as error:  # not raised: the next test would start them again
            return [dict.fromkeys(CASES, str(error))]
        return [torch.load(folder / f"failed-{count}-{rank}") for rank in range(count)]

    return of


@pytest.mark.parametrize(
    ("case", "count"), [(name, count) for count in (1, 2, 4) for name in CASES if count in counts_of(name)]
)
def test_ranks(failures: Failures, case: str, count: int) -> None:
    for rank, failed in enumerate(failures(count)):
        assert case not in failed, f"on rank {rank}: {failed[case]}"
