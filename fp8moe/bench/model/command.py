"""The run of `python -m fp8moe bench --model`, and its tables."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from fp8moe.bench import tables
from fp8moe.bench.model.kernels import KernelShare
from fp8moe.bench.model.measure import ModelResult, Workload, measure_model
from fp8moe.bench.record import document_of, environment_of, write_document

FORMAT = 2
"""Raised when a field of the JSON changes its meaning."""
JSON_NAME, MARKDOWN_NAME = "model.json", "model.md"


def run_model(workload: Workload, device: torch.device, compiled: bool, output: Path | None) -> None:
    """Measure, print, and write to `output`."""
    console = tables.make_console()
    environment = environment_of(device)
    console.print(f"{environment.device}, {environment.versions}")
    changed = f" ({workload.model.changed})" if workload.model.changed else ""
    title = (
        f"{workload.model.name}{changed}, {workload.layers} layers, {workload.batch} x {workload.length} tokens, bf16"
    )
    with console.status("starting") as status:
        results = measure_model(workload, device, compiled, status.update)
    shown = [step_table(title, results)]
    if results[0].kernels:
        shown += [kernel_table(results), *map(outside_table, results)]
    for table in shown:
        console.print("", table, sep="\n")
    if output:
        document = document_of(
            FORMAT, "model", environment, model=title, results=[asdict(result) for result in results]
        )
        write_document(document, output / JSON_NAME)
        (output / MARKDOWN_NAME).write_text("\n".join(map(tables.as_markdown, shown)))
        console.print(f"written to {output}: {JSON_NAME}, {MARKDOWN_NAME}")


def step_table(title: str, results: Sequence[ModelResult]) -> Table:
    """A row for each way to compute the model; speeds are against transformers' experts, compiled as the row is."""
    table = tables.new_table(title)
    table.add_column("experts", no_wrap=True)
    for column in (
        "forward+\nbackward ms", "spread", "speed", "step\nms", "spread", "speed", "tokens/s", "busy\nms",
        "gaps\nms (share)", "peak\nGiB",
        "loss\nfirst", "loss\nlast", "graph\nbreaks", "graphs",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for result in results:
        base = next(other for other in results if other.compiled is result.compiled)
        busy = result.busy_ms
        table.add_row(
            result.name,
            f"{result.backward_ms:.2f}", _spread(result.backward_ms, *result.backward_range_ms),
            f"{base.backward_ms / result.backward_ms:.2f}",
            f"{result.step_ms:.2f}", _spread(result.step_ms, *result.step_range_ms),
            f"{base.step_ms / result.step_ms:.2f}",
            f"{result.tokens_per_second:,.0f}",
            *(("-", "-") if busy is None else (f"{busy:.2f}", _gaps(result.backward_ms, busy))),
            "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.1f}",
            *(f"{loss:.4f}" for loss in result.losses),
            str(result.graph_breaks), str(result.graphs),
        )  # fmt: skip
    return table


def kernel_table(results: Sequence[ModelResult]) -> Table:
    """What the kernels of forward and backward take in ms, and how many there are."""
    table = tables.new_table("kernels of forward and backward: ms (launches)")
    table.add_column("kernels")
    for result in results:
        table.add_column(result.name.replace(", ", "\n"), justify="right")
    found = [{share.name: share for share in result.kernels} for result in results]
    costs = {name: max(kinds[name].ms for kinds in found if name in kinds) for kinds in found for name in kinds}
    for name in sorted(costs, key=lambda name: -costs[name]):
        table.add_row(name, *(_cell(kinds.get(name)) for kinds in found))
    return table


def outside_table(result: ModelResult) -> Table:
    """The costliest kernels that are neither experts, attention nor matrix products."""
    table = tables.new_table(f"{result.name}: other kernels")
    table.add_column("ms", justify="right")
    table.add_column("launches", justify="right")
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=60)
    table.add_column("launched by", overflow="fold")
    for share in result.outside:
        table.add_row(f"{share.ms:.3f}", f"{share.calls:.0f}", Text(share.name), Text(share.op))
    return table


def _spread(median_ms: float, least_ms: float, most_ms: float) -> str:
    """From the fastest round to the slowest."""
    return f"{(most_ms - least_ms) / median_ms:.1%}"


def _gaps(backward_ms: float, busy_ms: float) -> str:
    """When no kernel ran: mostly the device waited for the host."""
    gaps = max(backward_ms - busy_ms, 0.0)
    return f"{gaps:.2f} ({gaps / backward_ms:.0%})"


def _cell(share: KernelShare | None) -> str:
    return "-" if share is None else f"{share.ms:.2f} ({share.calls:.0f})"
