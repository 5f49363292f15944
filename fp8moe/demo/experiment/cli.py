"""`python -m fp8moe experiment run | report`."""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

from fp8moe.demo.arguments import names_among
from fp8moe.demo.experiment.recipes import RECIPES, SIZES
from fp8moe.demo.settings import RunConfig

_SET_BY_RECIPES = ("precision", "seed")
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `experiment`, and their flags."""
    commands = parser.add_subparsers(dest="experiment_command", required=True)

    about = "train recipes with several seeds, as far as the time allows; run it again to go on"
    sitting = commands.add_parser("run", help=about, description=about)
    sitting.add_argument("--output", type=Path, default=Path("runs/experiment"), help="where results and runs lie")
    sitting.add_argument(
        "--recipes", type=names_among(RECIPES), default=("bf16", "fp8-128", "fp8-256"), metavar="NAMES",
        help=f"comma-separated, baselines first: {', '.join(RECIPES)} (default: bf16,fp8-128,fp8-256)",
    )  # fmt: skip
    sitting.add_argument(
        "--seeds", type=_seeds, default=(0, 1, 2), metavar="NUMBERS", help="comma-separated (default: 0,1,2)"
    )
    sitting.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop then, with a checkpoint (default: at the end)"
    )
    sitting.add_argument(
        "--only-whole-runs", action="store_true",
        help="begin no run that there is too little time for: where checkpoints will not last",
    )  # fmt: skip
    for entry in fields(RunConfig):
        if entry.name not in _SET_BY_RECIPES:
            default = SIZES.get(entry.name, entry.default)
            parsing = {
                **entry.metadata,
                "help": f"{entry.metadata['help'].rsplit(' (default', 1)[0]} (default: {default})",
            }
            sitting.add_argument(f"--{entry.name.replace('_', '-')}", default=default, **parsing)
    sitting.set_defaults(run=_run)

    about = "a table of the results, and their curves"
    report = commands.add_parser("report", help=about, description=about)
    files = "results.json files of one experiment, as they are or compressed as .json.xz"
    report.add_argument("files", nargs="+", type=Path, metavar="RESULTS", help=files)
    report.add_argument("--table", type=Path, help="write the table here too")
    report.add_argument("--curves", type=Path, help="write the curves here, as a PNG")
    report.set_defaults(run=_report)


def _run(args: argparse.Namespace) -> int:
    from fp8moe import BackendUnavailableError
    from fp8moe.demo.data import load_corpus
    from fp8moe.demo.experiment.sitting import Clock, Plan, sit
    from fp8moe.demo.interrupt import stop_on_signals
    from fp8moe.demo.training import resolve_device
    from fp8moe.gemm.select import select_for_device

    started = time.monotonic()
    names = [entry.name for entry in fields(RunConfig) if entry.name not in _SET_BY_RECIPES]
    try:
        base = RunConfig(**{name: getattr(args, name) for name in names})
        plan = Plan(base, args.recipes, args.seeds)
        if any("fp8" in config.precisions for _, _, config in plan.runs()):
            select_for_device(base.fp8, resolve_device(base.device))
        corpus = load_corpus(base.data, base.seq_len)
        with stop_on_signals() as signals:
            clock = Clock(signals, args.seconds, started)
            complete = sit(plan, corpus, args.output, clock, args.only_whole_runs)
    except (BackendUnavailableError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second request
        return _INTERRUPTED
    return 0 if complete or not signals.requested else _INTERRUPTED


def _report(args: argparse.Namespace) -> int:
    from fp8moe.demo.experiment.report import markdown
    from fp8moe.demo.experiment.results import merged

    try:
        results = merged(args.files)
        if not results:
            raise ValueError(f"{', '.join(map(str, args.files))}: there are no results yet")
        table = markdown(results)
        print(table, end="")
        if args.table:
            args.table.write_text(table)
        if args.curves:
            from fp8moe.demo.experiment.curves import plot

            plot(results, args.curves)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        print("error: --curves needs matplotlib: pip install 'fp8moe[demo]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 0,1,2") from None
