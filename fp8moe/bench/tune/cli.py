"""`python -m fp8moe tune`: the flags, and a run from them."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from pprint import pformat

import torch

from fp8moe.bench.cli import BAD_ARGUMENTS, FAILURE, SUCCESS, check_extras
from fp8moe.bench.timing import Budget, host_microseconds, stopwatch_for
from fp8moe.bench.tune import grid
from fp8moe.bench.tune.fit import fit_model
from fp8moe.bench.tune.loss import Loss, measure_loss, near_break_even
from fp8moe.bench.tune.measure import FP8_ONLY, Sample, measure_case
from fp8moe.config import KernelPreference
from fp8moe.devices import device_name
from fp8moe.gemm.cost import CostModel
from fp8moe.gemm.explain import explain
from fp8moe.gemm.tuning import VARIABLE, deciding_model, read_models, tuning_path, write_model

BUDGET = Budget(milliseconds=15.0, repetitions=3, min_runs=2, max_runs=10)
"""For each way to compute a shape."""
QUICK_BUDGET = Budget(milliseconds=5.0, repetitions=3, min_runs=2, max_runs=3)
LOSS_BUDGET = Budget(milliseconds=60.0, repetitions=3)
"""For AUTO, and for eager PyTorch."""
WIDTH = 110
"""Columns of the model in Python."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tune`."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the file to put the model into; AUTO reads it where {VARIABLE} names it (default: the file that AUTO "
        f"reads, {VARIABLE} or fp8moe/tuning.json in the user's cache)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the model, and write nothing")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats, a rougher model")


def run(args: argparse.Namespace) -> int:
    """Measure on the current CUDA device, print and write.

    Returns:
        The exit status: 1 if the model could not be written, 2 for what cannot be met.

    Raises:
        RuntimeError: a shape could not be measured, for want of memory perhaps.
    """
    path = args.output or tuning_path()
    try:
        check_extras("rich")
        device = device_to_tune()
        before = deciding_model(device)
        read_models(path)  # now: nothing is measured in vain
    except ValueError as error:
        print(f"fp8moe tune: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS

    from fp8moe.bench import tables  # needs rich
    from fp8moe.bench.tune import report

    console = tables.make_console()
    with console.status("") as status:
        samples = measure_all(device, args.quick, status.update)
    model = fit_model(samples, device_name(device), _measured(samples))
    found, found_before = (report.verdicts(samples, each, model) for each in (model, before.model))
    console.print(report.verdict_table(found))
    loss, loss_before = (max(verdict.loss for verdict in each) for each in (found, found_before))
    print(f"AUTO by this model takes at most {loss:.1%} longer than the better of both")
    print(f"AUTO as it was   takes at most {loss_before:.1%} longer ({before.origin})")
    with console.status("") as status:
        losses = measure_losses(samples, model, device, args.quick, status.update)
    console.print(report.loss_table(losses))
    worst = max(losses, key=lambda loss: loss.ratio)
    print(f"AUTO takes at most {worst.ratio:.2f} of eager PyTorch's time near its break-even: {worst.title}")
    print(f"\nThe model, as fp8moe/gemm/cost.py has it:\n{pformat(model, width=WIDTH)}")
    if args.dry_run:
        return SUCCESS
    try:
        write_model(model, path)
    except OSError as error:
        print(f"fp8moe tune: error: {path} cannot be written ({error}); name another with --output", file=sys.stderr)
        return FAILURE
    print(f"\nwritten to {path}" + ("" if path == tuning_path() else f"; AUTO reads it with {VARIABLE}={path}"))
    return SUCCESS


def device_to_tune() -> torch.device:
    """The current CUDA device.

    Raises:
        ValueError: there is none, or FP8 cannot run there.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "torch sees no CUDA GPU, and AUTO has nothing to choose on a CPU: run it on the GPU that is to be tuned"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    explanation = explain(device, FP8_ONLY)
    if any(choice.backend is KernelPreference.EMULATED for choice in explanation.selected.values()):
        lacks = dict.fromkeys(str(missing) for backend in explanation.lacks.values() for missing in backend)
        raise ValueError(f"no FP8 backend can run on {explanation.device}: AUTO takes BF16 there. {' '.join(lacks)}")
    return device


def measure_all(device: torch.device, quick: bool, tell: Callable[[str], object]) -> list[Sample]:
    """Every shape of the grid.

    Args:
        device: the current one.
        quick: as the flag.
        tell: is told what is going on.

    Raises:
        RuntimeError: a shape could not be measured.
    """
    samples = []
    stopwatch, cases = stopwatch_for(device), grid.cases(quick)
    for number, (case, with_host) in enumerate(zip(cases, grid.with_host(cases), strict=True), 1):
        tell(f"{number} of {len(cases)}: {case.title}")
        launches = partial(host_microseconds, device=device) if with_host else None
        try:
            samples.append(measure_case(case, device, stopwatch, QUICK_BUDGET if quick else BUDGET, launches))
        except RuntimeError as error:
            error.add_note(f"while {case.title} was measured")
            raise
    return samples


def measure_losses(
    samples: Sequence[Sample], model: CostModel, device: torch.device, quick: bool, tell: Callable[[str], object]
) -> list[Loss]:
    """AUTO by `model` beside eager PyTorch, of the shapes between whose ways it is hardest to choose; arguments as of
    `measure_all`."""
    losses, stopwatch, cases = [], stopwatch_for(device), near_break_even(samples, grid.cases(quick), model)
    for number, case in enumerate(cases, 1):
        tell(f"beside eager PyTorch, {number} of {len(cases)}: {case.title}")
        losses.append(measure_loss(case, model, device, stopwatch, LOSS_BUDGET))
    return losses


def _measured(samples: Sequence[Sample]) -> str:
    """The origin of a model in words."""
    layers = sum(sample.layer for sample in samples)
    versions = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    return f"{datetime.now(UTC).date()}, {versions}: {len(samples) - layers} products, {layers} layers"
