"""What a run reports: at its start what will train on what, at its end the losses as a table and a picture."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fp8moe import explain
from fp8moe.demo.data import Corpus
from fp8moe.demo.model import MoELanguageModel
from fp8moe.demo.plot import plot_losses
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import Precision, RunConfig
from fp8moe.demo.training import StepRecord, resolve_device

# Measured on five BF16 runs of the default size whose parameters differed by one part in a thousand at the start.
_NOISE = "training amplifies rounding: at the default size BF16 runs end up to 1.6 % apart from that alone"


def introduce(console: Console, run: Run, corpus: Corpus) -> None:
    """Say what will train, on what, and where."""
    config = run.config
    explanation = explain(resolve_device(config.device), config.fp8)
    train, validation = (
        decimal(len(part)) if corpus.unit == "byte" else f"{len(part):,} {corpus.unit}s"
        for part in (corpus.train, corpus.validation)
    )
    lines = {
        "run": str(run.path),
        "model": describe(config, corpus.vocabulary),
        "data": f"{corpus.source}: {train}, and {validation} held out",
        "device": explanation.device,
    }
    if "fp8" in config.precisions:
        lines["FP8"] = "; ".join(dict.fromkeys(map(str, explanation.selected.values())))
    for name, text in lines.items():
        console.print(f"{name:<6} {text}", markup=False, highlight=False, soft_wrap=True)


def report(console: Console, run: Run, corpus: Corpus) -> None:
    """Print the table and what the models write, and make `loss.png`, as far as the run has come."""
    records = {precision: steps for precision in run.config.precisions if (steps := run.records(precision))}
    if records:
        console.print(comparison(records, corpus.unit))
        if len(records) == 2:
            console.print(f"[dim]{_NOISE}")
        plot_losses(
            records, f"{describe(run.config, corpus.vocabulary)}\n{corpus.source}", run.path / "loss.png", corpus.unit
        )
    for precision in records:
        sample = run.file(precision, "sample.txt")
        if sample.exists():
            console.print(f"[bold]{precision.upper()} writes")
            console.print(sample.read_text(errors="replace"), markup=False, highlight=False)
    console.print(f"everything is in {run.path}", markup=False, highlight=False, soft_wrap=True)


def comparison(records: Mapping[Precision, Sequence[StepRecord]], unit: str = "byte") -> Table:
    """The precisions side by side. A gap is relative to BF16, as far as both have come; above zero is worse."""
    title = f"losses in nats per {unit}; last: mean over a tenth of the steps; gap: to BF16"
    table = Table("", title=title, title_justify="left")
    for column in ("steps", "first", "last", "gap", "held-out", "gap", "tokens/s"):
        table.add_column(column, justify="right")
    losses = {precision: [step["loss"] for step in steps] for precision, steps in records.items()}
    measured = {name: [step["val_loss"] for step in steps if "val_loss" in step] for name, steps in records.items()}
    for precision, steps in records.items():
        held_out = measured[precision]
        last, baseline = _both(losses, precision)
        last_held_out, baseline_held_out = _both(measured, precision)
        table.add_row(
            precision.upper(),
            str(len(steps)),
            f"{losses[precision][0]:.3f}",
            f"{_last_mean(losses[precision]):.4f}",
            f"{_last_mean(last) / _last_mean(baseline) - 1:+.2%}" if baseline else "",
            f"{held_out[-1]:.4f}" if held_out else "",
            f"{last_held_out[-1] / baseline_held_out[-1] - 1:+.2%}" if baseline_held_out else "",
            f"{median(step['tokens_per_second'] for step in steps):,.0f}",
        )
    return table


def _both(losses: Mapping[Precision, list[float]], precision: Precision) -> tuple[list[float], list[float]]:
    """The losses of a precision and of the baseline that both have measured."""
    mine, its = losses[precision], [] if precision == "bf16" else losses.get("bf16", [])
    return mine[: len(its)], its[: len(mine)]


def _last_mean(losses: Sequence[float]) -> float:
    return fmean(losses[-max(1, len(losses) // 10) :])


def describe(config: RunConfig, vocabulary: int) -> str:
    """As in `986k parameters: 2 layers, width 128, 8 experts, top-2`."""
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in MoELanguageModel(config, "bf16", vocabulary).parameters())
    sizes = f"{config.layers} layers, width {config.hidden}, {config.experts} experts, top-{config.top_k}"
    return f"{parameters / 1e3:,.0f}k parameters: {sizes}"
