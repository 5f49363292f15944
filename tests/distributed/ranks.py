"""The processes of the tests: each runs all cases, in one process group, and writes down what failed."""

import os
import traceback
import warnings
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from fp8moe.distributed import ep_moe_forward

TIMEOUT = timedelta(seconds=60)
"""After which a rank gives up waiting for another that failed."""


def join(folder: str, rank: int, count: int, timeout: timedelta = TIMEOUT) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{count}", rank=rank, world_size=count, timeout=timeout
    )


def run_cases(rank: int, count: int, folder: str, module: str = "tests.distributed.all_cases") -> None:
    """Those of `module`."""
    from tests.distributed.cases import NOTED, Rank

    cases = import_module(module).CASES
    join(folder, rank, count)
    failed = {}
    for name, case in cases.items():
        if count not in getattr(case, "counts", (count,)):
            continue
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings(action="error"):
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                case(Rank(rank, count))
        except BaseException:
            NOTED.append(traceback.format_exc())
        if NOTED:
            failed[name] = "\n".join(NOTED)
            NOTED.clear()
    torch.save(failed, Path(folder) / f"failed-{count}-{rank}")
    dist.destroy_process_group()


def failures_of(count: int, folder: Path, module: str = "tests.distributed.all_cases") -> list[dict[str, str]]:
    """What failed on each of `count` ranks, by the names of the cases of `module`. All run in one set of processes:
    starting these takes long."""
    try:
        spawn(run_cases, (count, str(folder), module), nprocs=count)
    except ProcessException as error:  # not raised: the next test would start them again
        return [dict.fromkeys(import_module(module).CASES, str(error))]
    return [torch.load(folder / f"failed-{count}-{rank}") for rank in range(count)]


def lose_a_rank(rank: int, count: int, folder: str) -> None:
    """The last rank is gone when the others call."""
    join(folder, rank, count, timedelta(seconds=5))
    w_gate_up, w_down = torch.randn(1, 256, 128), torch.randn(1, 128, 128)
    hidden, ids, weights = torch.randn(4, 128), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
    ep_moe_forward(hidden, ids, weights, w_gate_up, w_down, None)  # they have met
    if rank == count - 1:
        os._exit(0)
    try:
        ep_moe_forward(hidden, ids, weights, w_gate_up, w_down, None)
        message = "nothing happened"
    except RuntimeError as error:
        message = str(error)
    torch.save(message, Path(folder) / "lost")
    os._exit(0)  # the group cannot be left in order
