"""What a run reports: at its start what will train on what, at its end the losses as a table, JSON and a picture."""

from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fp8moe import explain
from fp8moe.demo.data import Corpus
from fp8moe.demo.model import MoELanguageModel
from fp8moe.demo.plot import plot_losses
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import Precision, RunConfig
from fp8moe.demo.summary import NOISE, PrecisionSummary, summarize, to_json
from fp8moe.demo.training import resolve_device

Status = Literal["complete", "interrupted", "diverged"]


def introduce(console: Console, run: Run, corpus: Corpus) -> None:
    """Say what will train, on what, and where."""
    config = run.config
    explanation = explain(resolve_device(config.device), config.fp8)
    lines = Table.grid(padding=(0, 2))
    lines.add_row("[bold]run", escape(str(run.path)))
    lines.add_row("[bold]model", describe_model(config))
    lines.add_row(
        "[bold]data",
        f"{escape(corpus.source)}: {_size(len(corpus.train), 'B')}, and {_size(len(corpus.validation), 'B')} held out"
        + (f" ({corpus.skipped} files skipped: not text)" if corpus.skipped else ""),
    )
    lines.add_row("[bold]device", explanation.device)
    if "fp8" in config.precision:
        selected = dict.fromkeys(map(str, explanation.selected.values()))
        lines.add_row("[bold]FP8", "; ".join(selected))
    console.print(lines, highlight=False)


def report(console: Console, run: Run, corpus: Corpus, status: Status) -> None:
    """Write `summary.json` and `loss.png`, and print the table."""
    config = run.config
    records = {precision: run.records(precision) for precision in config.precision}
    summaries = summarize(records)
    run.write_summary(to_json(status, summaries))
    console.print(_table(summaries))
    if any(summary.train_gap is not None for summary in summaries.values()):
        console.print(f"[dim]{NOISE}")
    if any(records.values()):
        precisions = " and ".join(precision.upper() for precision in config.precision)
        title = f"{precisions} training of a Mixture-of-Experts language model"
        subtitle = (
            f"{describe_model(config)}\n{corpus.source}; {config.batch_size} x {config.seq_len} bytes a step, "
            f"peak learning rate {config.lr:g}, seed {config.seed}"
        )
        with run.replacing("loss.png") as stream:
            plot_losses(records, title, subtitle, stream)
    for precision in config.precision:
        sample = run.file(precision, "sample.txt")
        if sample.exists():
            console.print(f"[bold]{precision.upper()} writes[/bold] [dim]({escape(str(sample))})")
            console.print(sample.read_text(errors="replace"), markup=False, highlight=False)
    files = f"metrics, checkpoints, summary.json and loss.png are in [bold]{escape(str(run.path))}"
    console.print(files, highlight=False, soft_wrap=True)


def describe_model(config: RunConfig) -> str:
    """As in `986k parameters, 396k active: 2 layers, width 128, 8 experts, top-2`."""
    with torch.device("meta"):
        model = MoELanguageModel(config.model, "bf16", config.fp8)
    total = sum(weight.numel() for weight in model.parameters())
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    active = total - experts + experts * config.model.top_k // config.model.experts
    sizes = f"{config.model.layers} layers, width {config.model.hidden}, {config.model.experts} experts"
    return f"{_size(total)} parameters, {_size(active)} active: {sizes}, top-{config.model.top_k}"


def _table(summaries: dict[Precision, PrecisionSummary]) -> Table:
    """The precisions side by side. A gap is relative to BF16; above zero is worse."""
    caption = "losses in nats per byte; last: mean over a tenth of the steps; gap: to BF16"
    table = Table("", title=caption, title_justify="left")
    for column in ("steps", "first", "last", "gap", "held-out", "gap", "tokens/s"):
        table.add_column(column, justify="right")
    for precision, summary in summaries.items():
        table.add_row(
            precision.upper(),
            str(summary.steps),
            _number(summary.first_loss, ".3f"),
            _number(summary.last_loss, ".4f"),
            _number(summary.train_gap, "+.2%"),
            _number(summary.val_loss, ".4f"),
            _number(summary.val_gap, "+.2%"),
            _number(summary.tokens_per_second, ",.0f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(count: int, unit: str = "") -> str:
    """As in 1.2M; bytes as in 1.2 MB."""
    space = " " if unit else ""
    for scale, prefix in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g}{space}{prefix}{unit}"
    return f"{count}{space}{unit}"
