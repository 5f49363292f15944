"""The run of `python -m fp8moe bench --distributed`: what the first rank prints and writes."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fp8moe.bench import tables
from fp8moe.bench.distributed.figures import ShapeFigures
from fp8moe.bench.distributed.fsdp import StepFigures, measure_steps
from fp8moe.bench.distributed.measure import Site, measure_shape
from fp8moe.bench.distributed.ranks import LAUNCH, Ranks
from fp8moe.bench.distributed.tables import layer_table, step_table, wire_table
from fp8moe.bench.figures import Failure
from fp8moe.bench.model.measure import Workload
from fp8moe.bench.record import document_of, environment_of, shape_document, write_document
from fp8moe.bench.shapes import Balance, Shape
from fp8moe.bench.timing import Budget

FORMAT = 1
"""Raised when a field of the JSON changes its meaning."""
WHAT = "distributed"
JSON_NAME, CHART_NAME, MODEL_JSON_NAME, MODEL_MARKDOWN_NAME = (
    "distributed.json", "distributed.png", "fsdp.json", "fsdp.md"
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Where a run takes place, and what it tells."""

    ranks: Ranks
    site: Site
    output: Path | None

    def console(self) -> Console:
        """That of the first rank; others say nothing."""
        console = tables.make_console()
        console.quiet = not self.ranks.is_first
        return console

    def heading(self) -> str:
        """The ranks, and what is installed."""
        environment, ranks = environment_of(self.ranks.device), self.ranks
        warning = "" if ranks.device.type == "cuda" else "\nThese are times of CPUs: they say nothing about GPUs."
        return f"{ranks.count} x {environment.device}, {environment.versions}{warning}"

    def document(self, what: str, **figures: Any) -> dict[str, Any]:
        """All that is written, as JSON has it."""
        launch = LAUNCH.split(" bench")[0].replace("2", str(self.ranks.count))
        environment = environment_of(self.ranks.device)
        return document_of(FORMAT, what, environment, launch=launch, ranks=self.ranks.count, **figures)

    def write(self, name: str, document: dict[str, Any]) -> None:
        """Into the output folder, on the first rank, if there is one."""
        if self.output and self.ranks.is_first:
            write_document(document, self.output / name)


def run_layers(run: Run, cases: Sequence[tuple[Shape, Balance]], *, layers: bool, wire: bool) -> bool:
    """Measure, print, and write. Whether all that is ours is right."""
    console, found = run.console(), list[ShapeFigures]()
    console.print(run.heading())
    for shape, balance in cases:
        with console.status(f"measuring {shape.title}, {balance.value} routing"):
            figures = measure_shape(shape, balance, run.site, layers=layers, wire=wire)
        found.append(figures)
        if figures.bf16:
            console.print("", layer_table(figures, run.ranks.count), sep="\n")
        for failure in figures.failures:
            console.print(f"{failure.name}: {failure.error}", style="red", markup=False)
        for name, reason in figures.no_graphs.items():
            console.print(f"No graph time for {name}: {reason}", markup=False)
        if figures.wire:
            console.print("", wire_table(figures, run.ranks.count), sep="\n")
        _give_back_memory(run.ranks)
        run.write(JSON_NAME, run.document(WHAT, ceilings={"fp8_tflop_s": None}, problems=list(map(_written, found))))
    written = [JSON_NAME]
    if run.output and run.ranks.is_first and layers:
        from fp8moe.bench.chart import draw  # needs matplotlib

        draw(run.output / JSON_NAME, run.output / CHART_NAME)
        written.append(CHART_NAME)
    if run.output:
        console.print(f"written to {run.output}: {', '.join(written)}")
    return not any(failure.is_ours for figures in found for failure in figures.failures)


def run_model(run: Run, workload: Workload, budget: Budget) -> bool:
    """Measure training steps under FSDP2, print, and write. Whether all that is ours is right."""
    console = run.console()
    console.print(run.heading())
    changed = f" ({workload.model.changed})" if workload.model.changed else ""
    title = (
        f"{workload.model.name}{changed}, {workload.layers} layers, FSDP2 over {run.ranks.count} ranks, "
        f"{workload.batch} x {workload.length} tokens a rank, bf16"
    )
    with console.status("starting") as status:
        update: Callable[[str], None] = status.update
        steps: list[StepFigures | Failure] = measure_steps(workload, run.ranks, run.site.stopwatch, budget, update)
    table = step_table(title, steps)
    console.print("", table, sep="\n")
    failures = [step for step in steps if isinstance(step, Failure)]
    for failure in failures:
        console.print(f"{failure.name}: {failure.error}", style="red", markup=False)
    run.write(MODEL_JSON_NAME, run.document("fsdp", model=title, results=list(map(asdict, steps))))
    if run.output and run.ranks.is_first:
        (run.output / MODEL_MARKDOWN_NAME).write_text(tables.as_markdown(table))
        console.print(f"written to {run.output}: {MODEL_JSON_NAME}, {MODEL_MARKDOWN_NAME}")
    return not any(failure.is_ours for failure in failures)


def _written(figures: ShapeFigures) -> dict[str, Any]:
    return {**asdict(figures), "shape": shape_document(figures.shape), "routing": figures.routing.value}


def _give_back_memory(ranks: Ranks) -> None:
    """Before the next shape, whose tensors have other sizes."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
