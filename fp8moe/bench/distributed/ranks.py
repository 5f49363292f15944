"""The ranks of a run: how they start together, and agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.bench.timing import Stages, Stopwatch, stopwatch_for

LAUNCH = "torchrun --nproc-per-node 2 -m fp8moe bench --distributed"
TIMEOUT = timedelta(minutes=5)
"""After which ranks give up waiting for one that failed: longer than any compiles."""


class Ranks:
    """This process among those that `torchrun` started."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = dist.get_rank(), dist.get_world_size(), device
        self._one = torch.ones(1, device=device)

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all: on CUDA the devices do, in stream order, and the hosts run ahead as they do in training."""
        dist.all_reduce(self._one, dist.ReduceOp.MAX)

    def gathered(self, mine: Tensor) -> Tensor:
        """`(P, ...)`, on the CPU: the tensors of all ranks, which have one shape and dtype."""
        mine = mine.to(self.device)
        each = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(each, mine)
        return torch.stack(each).cpu()

    def first_error(self, mine: str | None) -> str | None:
        """That of the first rank that has one: whatever fails on one rank counts as failed on all."""
        errors: list[str | None] = [None] * self.count
        dist.all_gather_object(errors, mine)
        return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None), None)

    def stopwatch(self) -> Stopwatch:
        """For what all ranks run together."""
        return SlowestRank(stopwatch_for(self.device, meet=self.meet), self)


class SlowestRank:
    """A run counts as it was on the rank where it took longest. All ranks start each at once.

    Args:
        stopwatch: of this rank, on which all ranks meet before each run.
        ranks: all of them.
    """

    def __init__(self, stopwatch: Stopwatch, ranks: Ranks) -> None:
        self._stopwatch, self._ranks = stopwatch, ranks

    def laps(self, stages: Stages, runs: int) -> list[tuple[float, ...]]:
        """As in `Stopwatch`, the same on all ranks."""
        mine = torch.tensor(self._stopwatch.laps(stages, runs), dtype=torch.float64)
        each = self._ranks.gathered(mine)  # (P, runs, stages)
        slowest = each.sum(2).argmax(0)
        return [tuple(each[rank, run].tolist()) for run, rank in enumerate(slowest.tolist())]


def check_launch() -> None:
    """That `torchrun` started this process, on a machine with enough GPUs, or with none.

    Raises:
        ValueError: it did not, or there are too few.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ValueError(f"--distributed needs torchrun, which sets {missing[0]}: {LAUNCH}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise ValueError(
            f"torchrun started {processes} processes on a machine with {torch.cuda.device_count()} GPUs; "
            "start one a GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


@contextmanager
def joined() -> Iterator[Ranks]:
    """The process group of all ranks, within the block: NCCL on GPUs, gloo on CPUs, where each rank has one thread."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(device)
    finally:
        dist.destroy_process_group()
