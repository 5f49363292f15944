"""Flags of `python -m fp8moe train`: where the run lies, and one for each field of `RunConfig` and `ModelConfig`."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from fp8moe.demo.settings import BACKENDS, MODEL_OPTIONS, RUN_OPTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`. One that is not given leaves no attribute, so that `--resume` can tell."""
    where = parser.add_argument_group("run")
    where.add_argument("--name", help="name of the run (default: run-1, run-2, ...)")
    where.add_argument("--output-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    where.add_argument("--resume", metavar="RUN", help="continue the run of this name, or in this directory")
    _add_options(parser.add_argument_group("training"), RUN_OPTIONS)
    _add_options(parser.add_argument_group("model"), MODEL_OPTIONS)


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
    given = {name: getattr(args, name) for name in (*RUN_OPTIONS, *MODEL_OPTIONS) if hasattr(args, name)}
    return train_command(given, name=args.name, output_dir=args.output_dir, resume=args.resume)


def _add_options(group: argparse._ArgumentGroup, options: Mapping[str, Field[Any]]) -> None:
    for name, entry in options.items():
        flag = f"--{name.replace('_', '-')}"
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        shown = ",".join(entry.default) if isinstance(entry.default, tuple) else entry.default
        about = entry.metadata["help"] if shown is None else f"{entry.metadata['help']} (default: {shown})"
        if isinstance(entry.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=about, **settings)
        elif name == "backend":
            group.add_argument(flag, choices=BACKENDS, help=about, **settings)
        else:
            group.add_argument(flag, type=_CONVERTERS.get(name, type(entry.default)), help=about, **settings)


_CONVERTERS = {
    "precision": lambda text: tuple(text.split(",")),
    "data": lambda text: str(Path(text).absolute()),  # a run may be resumed from another directory
}
