"""`python -m fp8moe evaluate`: the held-out loss of what a run trained, with its experts in several precisions."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fp8moe.demo.arguments import names_among
from fp8moe.demo.settings import PRECISIONS

QUANTIZED = {"int8": 8, "int4": 4}
"""The bits of the experts' weights, by what users call them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate`."""
    parser.add_argument("name", metavar="RUN", help="the run of this name, or in this directory, that `train` made")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument(
        "--experts",
        type=names_among(QUANTIZED),
        default=tuple(QUANTIZED),
        metavar="NAMES",
        help=f"how the experts compute beside BF16 and FP8, comma-separated: {', '.join(QUANTIZED)} (default: all)",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, help="weights of a row that share a scale (default: 128)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say.

    Returns:
        The exit code: 0; 2 for flags that cannot be met.
    """
    try:
        from rich.console import Console

        from fp8moe.demo.command import open_run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "rich"):
            raise
        print(f"error: evaluation needs {error.name}: pip install 'fp8moe[demo]'", file=sys.stderr)
        return 2
    try:
        opened, corpus = open_run(args.output_dir, args.name)
        losses = evaluate(opened, corpus, args.experts, args.group_size)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(losses, corpus.unit))
    return 0


def evaluate(run: Any, corpus: Any, experts: tuple[str, ...], group_size: int) -> dict[str, dict[str, float]]:
    """The held-out loss of each checkpoint of a run, with the experts in BF16, in FP8, and as `experts` names them.

    Raises:
        ValueError: the run has no checkpoint, or `group_size` is out of range.
    """
    from fp8moe.demo.model import MoE
    from fp8moe.demo.training import Trainer
    from fp8moe.int8 import Int8Experts, quantize_module

    losses: dict[str, dict[str, float]] = {}
    for trained in run.config.precisions:
        state = run.load_checkpoint(trained)
        if state is None:
            continue
        losses[trained] = {}
        for name in (*reversed(PRECISIONS), *experts):
            trainer = Trainer(run.config, "fp8" if name == "fp8" else "bf16", corpus)
            trainer.model.load_state_dict(state["model"])
            if name in QUANTIZED:
                for moe in (module for module in trainer.model.modules() if isinstance(module, MoE)):
                    trained_experts = quantize_module(moe.experts, QUANTIZED[name], group_size)
                    setattr(moe, "experts", Int8Experts(trained_experts))  # noqa: B010 (of another class)
            losses[trained][name] = trainer.validate()
    if not losses:
        raise ValueError(f"{run.path} has no checkpoint yet: let it train until its first one")
    return losses


def table(losses: dict[str, dict[str, float]], unit: str = "byte") -> Any:
    """A row for each checkpoint; gaps are to BF16 experts with the same parameters."""
    from rich.table import Table

    made = Table("trained in", title=f"held-out loss in nats per {unit}, and the gap to BF16", title_justify="left")
    for name in next(iter(losses.values())):
        made.add_column(name.upper(), justify="right")
    for trained, found in losses.items():
        cells = [
            f"{loss:.4f}" if name == "bf16" else f"{loss:.4f} ({loss / found['bf16'] - 1:+.2%})"
            for name, loss in found.items()
        ]
        made.add_row(trained.upper(), *cells)
    return made
