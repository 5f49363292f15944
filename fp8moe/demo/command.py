"""What `python -m fp8moe train` does: open or create a run, train it, report how it stands."""

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fp8moe import BackendUnavailableError
from fp8moe.demo.data import Corpus, load_corpus
from fp8moe.demo.interrupt import stop_on_signals
from fp8moe.demo.report import introduce, report
from fp8moe.demo.runs import Run
from fp8moe.demo.session import train
from fp8moe.demo.settings import RunConfig
from fp8moe.demo.training import resolve_device
from fp8moe.gemm.select import select_for_device

_INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


def train_command(given: dict[str, Any], name: str | None, output_dir: Path, resume: str | None) -> int:
    """Train a new run in `output_dir`, or the one that `resume` names; the exit code.

    A resumed run keeps its settings, so that its losses are those of a run that was never stopped. It keeps `steps`
    too, because the learning rate of every step depends on it.

    Args:
        given: the fields of `RunConfig` that the user gave.
        name: of the new run; None numbers it.
    """
    console = Console()
    try:
        with stop_on_signals() as stop:
            try:
                if resume is None:
                    run, corpus = _create(given, name, output_dir)
                else:
                    run, corpus = _resume(given, output_dir, resume)
            except (OSError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            introduce(console, run, corpus)
            try:
                complete = train(run, corpus, stop, console)
            except FloatingPointError as error:
                report(console, run, corpus)
                print(f"error: {error}", file=sys.stderr)
                return 1
            report(console, run, corpus)
    except KeyboardInterrupt:  # the second request
        print("stopped at once; --resume continues from the last checkpoint", file=sys.stderr)
        return _INTERRUPTED
    if complete:
        return 0
    print(f"interrupted; continue with: python -m fp8moe train --resume {shlex.quote(str(run.path))}")
    return _INTERRUPTED


def _create(given: dict[str, Any], name: str | None, output_dir: Path) -> tuple[Run, Corpus]:
    config = RunConfig(**given)
    corpus = _load(config)
    return Run.create(output_dir, name, config, corpus.sha256), corpus


def open_run(output_dir: Path, name: str) -> tuple[Run, Corpus]:
    """The run in the directory `name`, or in `output_dir / name`, and the text that it trains on.

    Raises:
        ValueError: there is no such run, or its text has changed.
        OSError: its text cannot be read.
    """
    run = Run.open(output_dir, name)
    corpus = _load(run.config)
    if corpus.sha256 != run.data_sha256:
        raise ValueError(f"{corpus.source} has changed since the run in {run.path} began: start a new run")
    return run, corpus


def _resume(given: dict[str, Any], output_dir: Path, resume: str) -> tuple[Run, Corpus]:
    run = Run.open(output_dir, resume)
    for option, value in given.items():
        saved = getattr(run.config, option)
        if value != saved:
            raise ValueError(
                f"{option} is {value!r}, but the run in {run.path} was started with {saved!r}: "
                f"leave --{option.replace('_', '-')} out, or start a new run without --resume"
            )
    return open_run(output_dir, resume)


def _load(config: RunConfig) -> Corpus:
    """The text of a run that can train on this machine."""
    device = resolve_device(config.device)
    if "fp8" in config.precisions:
        try:
            select_for_device(config.fp8, device)
        except BackendUnavailableError as error:
            raise ValueError(f"backend is {config.backend!r}: {error}") from error
    return load_corpus(config.data, config.seq_len)
