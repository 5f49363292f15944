"""The run of `python -m fp8moe bench --int8`: tables, a file, and one line of JSON for the serving run."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from fp8moe.bench import tables
from fp8moe.bench.int8.sections import SECTIONS, Bench, Row
from fp8moe.bench.int8.serving import Served, serve
from fp8moe.bench.measure import Lab
from fp8moe.bench.record import document_of, environment_of, write_document

FORMAT = 1
"""Raised when a field of the JSON changes its meaning."""
JSON_NAME, MARKDOWN_NAME = "int8.json", "int8.md"


@torch.no_grad()
def run_int8(lab: Lab, device: torch.device, sections: Sequence[str], quick: bool, output: Path | None) -> None:
    """Measure these sections, print, and write to `output` after each."""
    bench, console = Bench(lab, device, quick), tables.make_console()
    environment = environment_of(device)
    console.print(
        f"{environment.device}, {environment.versions}, copy {lab.ceilings.copy_gb_s:.0f} GB/s", highlight=False
    )
    found: dict[str, list[dict[str, object]]] = {}
    shown = []
    for name in sections:
        with console.status(f"measuring {name}"):
            if name == "serving":
                served, line = serve(bench)
                table = serving_table(served)
                found[name] = [asdict(each) for each in served]
            else:
                rows = list(SECTIONS[name](bench))
                table = section_table(f"{name}: {(SECTIONS[name].__doc__ or '').split('.')[0]}", rows)
                found[name] = [row.as_json() for row in rows]
        shown.append(table)
        console.print("", table, sep="\n")
        if name == "serving":
            print(line)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if output:
            document = document_of(FORMAT, "int8", environment, ceilings=asdict(lab.ceilings), sections=found)
            write_document(document, output / JSON_NAME)
            (output / MARKDOWN_NAME).write_text("\n".join(map(tables.as_markdown, shown)))


def section_table(title: str, rows: Iterable[Row]) -> Table:
    """A line for each way; the ratio is against the first way of the case."""
    table = tables.new_table(" ".join(title.split()))
    for column, justify in (("case", "left"), ("way", "left"), ("us", "right"), ("spread", "right"), ("ratio", "right"),
                            ("GB/s", "right"), ("of copy", "right")):  # fmt: skip
        table.add_column(column, justify="left" if justify == "left" else "right", overflow="fold")
    case = ""
    for row in rows:
        table.add_row(
            row.case if row.case != case else "",
            row.way,
            f"{row.timing.median_ms * 1e3:.1f}",
            f"{row.timing.spread:.1%}",
            f"{row.ratio:.2f}",
            "-" if row.gb_s is None else f"{row.gb_s:.0f}",
            "-" if row.copy_share is None else f"{row.copy_share:.0%}",
        )
        case = row.case
    return table


def serving_table(rows: Sequence[Served]) -> Table:
    """A line for each way of computing the experts."""
    table = tables.new_table("serving: prefill and decode of a small model, in CUDA graphs")
    table.add_column("experts")
    for column in ("load s", "prefill ms", "decode ms", "tokens/s", "experts GiB", "peak GiB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.way, f"{row.load_s:.2f}", f"{row.prefill_ms:.2f}", f"{row.decode_ms:.1f}", f"{row.tokens_per_s:.0f}",
            f"{row.expert_bytes / 2**30:.2f}", "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
        )  # fmt: skip
    return table
