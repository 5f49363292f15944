"""The figures of several ranks as tables for a terminal."""

from rich.table import Table
from rich.text import Text

from fp8moe.bench.distributed.figures import ShapeFigures, WayFigures
from fp8moe.bench.distributed.fsdp import StepFigures
from fp8moe.bench.figures import Failure
from fp8moe.bench.tables import new_table


def layer_table(found: ShapeFigures, num_ranks: int) -> Table:
    """Each way to compute one layer, PyTorch's first."""
    least, most = min(found.rows_of_ranks), max(found.rows_of_ranks)
    rows = f"{least}" if least == most else f"{least} to {most}"
    table = new_table(
        f"{found.shape.title} on {num_ranks} ranks, {found.routing.value} routing, {rows} rows a rank, "
        f"tokens to {found.tokens_sent:.2f} ranks"
    )
    table.add_column("layer", no_wrap=True)
    for title in (
        "forward\nms", "backward\nms", "both\nms", "spread", "speed\n/ plain", "graph\nms", "without\nwire ms",
        "communi-\ncation", "wire\nalone ms", "of it\nhidden", "sent\nMB", "host\nus", "peak\nMiB", "SQNR\ndB",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for way in (found.bf16, *found.variants):
        if isinstance(way, Failure):
            table.add_row(Text(way.name), Text("failed", style="red"))
        elif way is not None:
            table.add_row(Text(way.name), *_cells(way))
    for alone in found.alone:
        both = alone.both
        table.add_row(Text(alone.name), "-", "-", f"{both.median_ms:.2f}", f"{both.spread:.1%}")
    return table


def wire_table(found: ShapeFigures, num_ranks: int) -> Table:
    """The collectives alone."""
    table = new_table(f"{found.shape.title} on {num_ranks} ranks, {found.routing.value} routing: the wire alone")
    table.add_column("collective", no_wrap=True)
    for title in ("ms", "spread", "sent\nMB", "GB/s", "speed\n/ bf16"):
        table.add_column(title, justify="right")
    for each in found.wire:
        table.add_row(
            each.name,
            f"{each.timing.median_ms:.3f}",
            f"{each.timing.spread:.1%}",
            f"{each.sent_bytes / 1e6:.2f}",
            f"{each.gb_s:.1f}",
            f"{each.speed_against_bf16:.2f}",
        )
    return table


def step_table(title: str, steps: list[StepFigures | Failure]) -> Table:
    """Training steps under FSDP2."""
    table = new_table(title)
    table.add_column("experts", no_wrap=True)
    for column in (
        "forward+\nbackward ms", "spread", "step\nms", "spread", "speed", "tokens/s\na rank", "peak\nGiB",
        "loss\nfirst", "loss\nlast",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for step in steps:
        if isinstance(step, Failure):
            table.add_row(Text(step.name), Text("failed", style="red"))
            continue
        table.add_row(
            step.name,
            f"{step.backward.median_ms:.2f}", f"{step.backward.spread:.1%}",
            f"{step.whole.median_ms:.2f}", f"{step.whole.spread:.1%}",
            f"{step.speed_against_bf16:.2f}", f"{step.tokens_per_second:,.0f}",
            "-" if step.peak_bytes is None else f"{step.peak_bytes / 2**30:.1f}",
            *(f"{loss:.4f}" for loss in step.losses),
        )  # fmt: skip
    return table


def _cells(way: WayFigures) -> list[str]:
    return [
        *(f"{timing.median_ms:.2f}" for timing in (way.forward, way.backward, way.both)),
        f"{way.both.spread:.1%}",
        f"{way.speed_against_bf16:.2f}",
        "-" if way.graph is None else f"{way.graph.median_ms:.2f}",
        f"{way.without_wire.median_ms:.2f}",
        f"{way.communication:.0%}",
        "-" if way.wire_ms is None else f"{way.wire_ms:.2f}",
        "-" if way.overlap is None else f"{way.overlap:.0%}",
        f"{way.sent_bytes / 1e6:.1f}",
        "-" if way.host_us is None else f"{way.host_us:.0f}",
        "-" if way.peak_bytes is None else f"{way.peak_bytes / 2**20:.0f}",
        f"{min(way.sqnr_db.values()):.0f}",
    ]
