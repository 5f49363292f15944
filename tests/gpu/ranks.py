"""Processes with a rank each, whose cases end together: with NCCL, a rank waits long for another that has failed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes


@dataclass(frozen=True)
class Rank:
    number: int
    count: int
    device: torch.device
    folder: Path
    """Of all ranks."""


Case = Callable[[Rank], None]


def run(
    cases: Sequence[Case], folder: Path, count: int = 2, seconds: float = 420, device_type: str = "cuda"
) -> dict[str, str]:
    """Run functions of a module on `count` ranks until one fails on any of them, or for so long; then all ranks end.

    Returns:
        what became of each case, by the name of its function: empty if all ranks passed it.
    """
    arguments = count, str(folder), list(cases), device_type
    context = start_processes(_run_cases, arguments, nprocs=count, join=False)
    assert context is not None
    failure, end = "", time.monotonic() + seconds
    try:
        while not context.join(timeout=1, grace_period=5):
            if time.monotonic() > end:
                failure = f"it did not end within {seconds} s"
                break
    except ProcessException as error:  # the others have been ended
        failure = str(error)
    finally:
        for process in context.processes:
            process.kill()
    files = [folder / f"passed-{rank}" for rank in range(count)]
    passed = [file.read_text().splitlines() if file.exists() else [] for file in files]
    names = [case.__name__ for case in cases]
    return {name: "" if all(name in each for each in passed) else failure or "it did not run" for name in names}


def _run_cases(number: int, count: int, folder: str, cases: Sequence[Case], device_type: str) -> None:
    store, device = f"file://{folder}/store", torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", init_method=store, rank=number, world_size=count, device_id=device)
    else:
        dist.init_process_group("gloo", init_method=store, rank=number, world_size=count)
    for case in cases:
        try:
            case(Rank(number, count, device, Path(folder)))
            if device_type == "cuda":
                torch.cuda.synchronize()
        except BaseException as error:
            raise RuntimeError(f"{case.__name__} on rank {number}") from error
        with (Path(folder) / f"passed-{number}").open("a") as file:
            file.write(f"{case.__name__}\n")
    dist.destroy_process_group()
