"""The figures as tables for a terminal."""

from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8moe.bench.figures import Failure, Measurement, Result
from fp8moe.bench.record import Report

NAMES_WIDTH = 14
"""Columns for the names of the products, and for two digits of each."""
WIDTH_WITHOUT_TERMINAL = 150
"""Columns where the output goes to a file or a pipe."""


def make_console() -> Console:
    """A console that is wide enough for the tables where nothing else limits it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL)


def heading(report: Report) -> Text:
    """Where the run takes place, and how fast that is."""
    environment, ceilings = report.environment, report.ceilings
    versions = [f"{package} {version}" for package, version in environment.packages.items() if version]
    fp8 = "no FP8 tensor cores"
    if ceilings.fp8_tflop_s is not None:
        fp8 = f"FP8 matrix product {ceilings.fp8_tflop_s:.0f} TFLOP/s"
    return Text(
        f"{', '.join([environment.device, *versions])}\n"
        f"measured ceilings: copy {ceilings.copy_gb_s:.0f} GB/s (read + written), "
        f"BF16 matrix product {ceilings.bf16_tflop_s:.3g} TFLOP/s, {fp8}"
    )


def variant_table(result: Result) -> Table:
    """Each variant of one problem, the fastest in BF16 first."""
    smallest, largest = min(result.group_sizes), max(result.group_sizes)
    rows = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    table = new_table(f"{result.shape.title}, {result.routing.value} routing, {rows} rows an expert")
    table.add_column("variant", no_wrap=True)
    table.add_column("kernels", overflow="fold")
    names = fill(" ".join(result.bf16.sqnr_db), NAMES_WIDTH)
    for title in (
        "forward\nms", "backward\nms", "both\nms", "spread", "speed\n/ BF16", "floor\n/ time", "graph\nms",
        "saved\nMiB", "saved\n/ BF16", "peak\nMiB", "host\nus", f"SQNR dB\n{names}",
    ):  # fmt: skip
        table.add_column(title, justify="right", overflow="fold")
    for variant in (result.bf16, *result.variants):
        if isinstance(variant, Failure):
            table.add_row(Text(variant.name), _failed(variant))
            continue
        floor_ms = None if "BF16" in variant.name + variant.computed_by else result.floor_ms
        table.add_row(
            Text(variant.name),
            Text(variant.computed_by),
            *(_ms(timing.median_ms) for timing in (variant.forward, variant.backward, variant.both)),
            f"{variant.both.spread:.1%}",
            f"{variant.speed_against_bf16:.2f}",
            "-" if floor_ms is None else f"{floor_ms / variant.both.median_ms:.0%}",
            "-" if variant.graph is None else _ms(variant.graph.median_ms),
            _mib(variant.saved_row_bytes),
            f"{variant.saved_against_bf16:.2f}",
            "-" if variant.peak_bytes is None else _mib(variant.peak_bytes),
            "-" if variant.host_us is None else f"{variant.host_us:.0f}",
            " ".join(f"{decibels:.0f}" for decibels in variant.sqnr_db.values()),
        )
    return table


def notes(result: Result) -> list[Text]:
    """What the variant table has no room for: what ratios are against, and why a figure is missing."""
    like = {row.compared_with for row in result.variants if isinstance(row, Measurement)} - {result.bf16.name}
    against = f"/ BF16 is against the fastest of PyTorch's ways: {result.bf16.name}"
    lines = [
        Text("Medians of repetitions by turns, in random order. Spread: of both, from the fastest to the slowest."),
        Text("; ".join([against, *(f"of rows with main_grad, {name}" for name in like)]) + "."),
    ]
    reasons: dict[str, list[str]] = {}
    for variant in (result.bf16, *result.variants):
        if not isinstance(variant, Failure) and variant.no_graph_because:
            reasons.setdefault(variant.no_graph_because, []).append(variant.name)
    lines += [Text(f"No graph time for {', '.join(names)}: {reason}") for reason, names in reasons.items()]
    lines += [Text(f"{failure.name}: {failure.error}", style="red") for failure in result.failures]
    return lines


def kernel_table(result: Result) -> Table:
    """Each kernel of one problem."""
    table = new_table(f"{result.shape.title}, {result.routing.value} routing: kernels")
    table.add_column("kernel")
    for title in ("time\nus", "floor\nus", "floor\n/ time", "SQNR\ndB"):
        table.add_column(title, justify="right")
    for kernel in result.kernels:
        if isinstance(kernel, Failure):
            table.add_row(Text(kernel.name), _failed(kernel))
            continue
        time_ms, floor_ms = kernel.timing.median_ms, kernel.floor_ms
        floor = ["-", "-"] if floor_ms is None else [f"{floor_ms * 1e3:.1f}", f"{floor_ms / time_ms:.0%}"]
        table.add_row(Text(kernel.name), f"{time_ms * 1e3:.1f}", *floor, f"{kernel.sqnr_db:.0f}")
    return table


def new_table(title: str) -> Table:
    """An empty table in the style of all."""
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def as_markdown(table: Table) -> str:
    """The same table for a page, such as those of the documentation."""
    rows = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    rows += map(list, zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    lines = ("| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([f"**{table.title}**", "", *lines, ""])


def _failed(failure: Failure) -> Text:
    return Text("failed" if failure.is_ours else "failed (a peer)", style="red")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _mib(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 10 else f"{mebibytes:.2f}"
