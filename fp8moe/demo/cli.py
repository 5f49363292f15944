"""Flags of `python -m fp8moe train`: where the run lies, and one for each field of `RunConfig`."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from fp8moe.demo.settings import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`. A setting that is not given leaves no attribute, so that `--resume` can tell."""
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", help="name of the new run (default: run-1, run-2, ...)")
    which.add_argument("--resume", metavar="RUN", help="continue the run of this name, or in this directory")
    for entry in fields(RunConfig):
        flag = f"--{entry.name.replace('_', '-')}"
        parser.add_argument(flag, default=argparse.SUPPRESS, **entry.metadata)


def run(args: argparse.Namespace) -> int:
    """Train as the flags say.

    Returns:
        The exit code: 0; 1 if the loss was not finite; 2 for flags that cannot be met; 130 if it was interrupted.
    """
    try:
        from fp8moe.demo.command import train_command
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("matplotlib", "rich"):
            raise
        print(f"error: training needs {missing}: pip install 'fp8moe[demo]'", file=sys.stderr)
        return 2
    given = {entry.name: getattr(args, entry.name) for entry in fields(RunConfig) if hasattr(args, entry.name)}
    return train_command(given, args.name, args.output_dir, args.resume)
