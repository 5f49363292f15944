"""What `python -m fp8moe train` does: open or create a run, train it, report how it stands."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fp8moe import explain
from fp8moe.demo.data import Corpus, load_corpus
from fp8moe.demo.display import ProgressDisplay
from fp8moe.demo.interrupt import StopRequest
from fp8moe.demo.report import introduce, report
from fp8moe.demo.runs import Run
from fp8moe.demo.session import train
from fp8moe.demo.settings import RunConfig
from fp8moe.demo.training import NonFiniteError, resolve_device

_FREE_ON_RESUME = {"checkpoint_every"}  # changes neither losses nor metrics
_INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended


def train_command(given: dict[str, Any], name: str | None, output_dir: Path, resume: str | None) -> int:
    """Train a new run, or the one that `resume` names.

    A resumed run keeps its settings, so that its losses are those of a run that was never stopped. It keeps `steps`
    too, because the learning rate of every step depends on it.

    Args:
        given: values of the options that the user gave, by field name of `RunConfig` or `ModelConfig`.
        name: of the new run; None numbers it.
        output_dir: where runs lie.

    Returns:
        The exit code: 0; 1 if the loss was not finite; 2 for options that cannot be met; 130 if it was interrupted.
    """
    console = Console()
    try:
        with StopRequest() as stop:
            try:
                if resume is None:
                    run, corpus = _create(given, name, output_dir)
                else:
                    run, corpus = _open(given, name, output_dir, resume)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            introduce(console, run, corpus)
            return _train(run, corpus, stop, console)
    except KeyboardInterrupt:  # the second request
        print("stopped at once; --resume continues from the last checkpoint", file=sys.stderr)
        return _INTERRUPTED


def _train(run: Run, corpus: Corpus, stop: StopRequest, console: Console) -> int:
    diverged: NonFiniteError | None = None
    with ProgressDisplay(console, run) as display:
        try:
            complete = train(run, corpus, stop, display)
        except NonFiniteError as error:
            diverged, complete = error, False
    if diverged is not None:
        report(console, run, corpus, "diverged")
        print(f"error: {diverged}", file=sys.stderr)
        return 1
    report(console, run, corpus, "complete" if complete else "interrupted")
    if complete:
        return 0
    print(f"interrupted; continue with: python -m fp8moe train --resume {shlex.quote(str(run.path))}")
    return _INTERRUPTED


def _create(given: dict[str, Any], name: str | None, output_dir: Path) -> tuple[Run, Corpus]:
    config = RunConfig.from_options(given)
    _check_device(config)
    corpus = load_corpus(config.data, config.seq_len)
    return Run.create(output_dir, name, config, corpus.sha256), corpus


def _open(given: dict[str, Any], name: str | None, output_dir: Path, resume: str) -> tuple[Run, Corpus]:
    if name is not None:
        raise ValueError(f"--name {name} and --resume {resume} exclude each other: a resumed run keeps its name")
    run = Run.open(output_dir, resume)
    for option, value in given.items():
        saved = run.config.option(option)
        if option not in _FREE_ON_RESUME and value != saved:
            raise ValueError(
                f"{option} is {value!r}, but the run in {run.path} was started with {saved!r}: "
                f"leave --{option.replace('_', '-')} out, or start a new run without --resume"
            )
    changes = {option: given[option] for option in _FREE_ON_RESUME & given.keys()}
    run = replace(run, config=replace(run.config, **changes))
    _check_device(run.config)
    corpus = load_corpus(run.config.data, run.config.seq_len)
    if corpus.sha256 != run.data_sha256:
        raise ValueError(f"{corpus.source} has changed since the run in {run.path} began: start a new run")
    return run, corpus


def _check_device(config: RunConfig) -> None:
    """The device must exist, and the FP8 backend, if one was named, must be usable.

    Raises:
        ValueError: one of them is not; the message says what is missing.
    """
    device = resolve_device(config.device)
    if "fp8" in config.precision:
        explanation = explain(device, config.fp8)
        if not explanation.selected:
            lacks = " ".join(map(str, explanation.lacks[config.fp8.kernel_preference]))
            raise ValueError(f"backend is {config.backend!r}, which cannot run on {explanation.device}: {lacks}")
