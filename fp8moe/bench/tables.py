"""The figures as tables for a terminal."""

from collections.abc import Callable, Iterable, Mapping
from textwrap import fill
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8moe.bench.measure import Failure, KernelMeasurement, Measurement, Result
from fp8moe.bench.record import Report

T = TypeVar("T")

NO_FIGURE = "-"
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
    driver = [f"driver {environment.driver}"] if environment.driver else []
    fp8 = "no FP8 tensor cores"
    if ceilings.fp8_tflop_s is not None:
        fp8 = f"FP8 matrix product {ceilings.fp8_tflop_s:.0f} TFLOP/s"
    return Text(
        f"{', '.join([environment.device, *driver, *versions])}\n"
        f"measured ceilings: copy {ceilings.copy_gb_s:.0f} GB/s (read + written), "
        f"BF16 matrix product {ceilings.bf16_tflop_s:.3g} TFLOP/s, {fp8}"
    )


def variant_table(result: Result) -> Table:
    """Each variant of one problem, BF16 first."""
    names = fill(" ".join(result.bf16.agreement), NAMES_WIDTH)
    columns: dict[str, Callable[[Measurement], str]] = {
        "forward\nms": lambda variant: _ms(variant.forward.median_ms),
        "backward\nms": lambda variant: _ms(variant.backward.median_ms),
        "both\nms": lambda variant: _ms(variant.both.median_ms),
        "speed\n/ BF16": lambda variant: f"{variant.speed_against_bf16:.2f}",
        "floor\n/ time": lambda variant: _share(variant.both_floor_ms, variant.both.median_ms),
        "graph\nms": lambda variant: NO_FIGURE if variant.graph is None else _ms(variant.graph.median_ms),
        "saved\nMiB": lambda variant: _mib(variant.saved_row_bytes),
        "saved\n/ BF16": lambda variant: f"{variant.saved_against_bf16:.2f}",
        "peak\nMiB": lambda variant: _or_none(variant.peak_bytes, _mib),
        "host\nus": lambda variant: _or_none(variant.host_us, "{:.0f}".format),
        f"SQNR dB\n{names}": lambda variant: "" if variant is result.bf16 else _sqnr(variant),
    }
    table = new_table(_problem_title(result))
    table.add_column("variant", no_wrap=True)
    table.add_column("kernels", overflow="fold")
    _add(table, columns, (result.bf16, *result.variants), lambda variant: [variant.name, variant.computed_by])
    return table


def notes(result: Result) -> list[Text]:
    """What the variant table has no room for: why a figure is missing, and how steady the machine was."""
    lines = [
        Text(f"Timed by turns; meanwhile BF16's time for both changed to {result.bf16.both.drift:.3f} of what it was.")
    ]
    reasons: dict[str, list[str]] = {}
    for variant in (result.bf16, *result.variants):
        if isinstance(variant, Measurement) and variant.no_graph_because:
            reasons.setdefault(variant.no_graph_because, []).append(variant.name)
    lines += [Text(f"No graph time for {', '.join(names)}: {reason}") for reason, names in reasons.items()]
    lines += [Text(f"{failure.name}: {failure.error}", style="red") for failure in result.failures]
    return lines


def kernel_table(result: Result) -> Table:
    """Each kernel of one problem."""
    columns: dict[str, Callable[[KernelMeasurement], str]] = {
        "time\nus": lambda kernel: _us(kernel.timing.median_ms),
        "GB/s": lambda kernel: f"{kernel.gb_s:.0f}",
        "TFLOP/s": lambda kernel: f"{kernel.tflop_s:.3g}" if kernel.flops else NO_FIGURE,
        "floor\nus": lambda kernel: _or_none(kernel.floor_ms, _us),
        "floor\n/ time": lambda kernel: _share(kernel.floor_ms, kernel.timing.median_ms),
        "SQNR\ndB": lambda kernel: f"{kernel.sqnr_db:.0f}",
    }
    table = new_table(f"{_problem_title(result)}: kernels")
    table.add_column("kernel")
    _add(table, columns, result.kernels, lambda kernel: [kernel.name])
    return table


def summary_table(report: Report, title: str) -> Table:
    """One line a problem: BF16's time and everybody's speed against it."""
    table = new_table(f"{title}, forward and backward: speed against BF16")
    letters = ",".join(report.problems[0].shape.letters)
    table.add_column(f"shape ({letters})")
    table.add_column("routing")
    table.add_column("BF16 ms", justify="right")
    names = dict.fromkeys(variant.name for problem in report.problems for variant in problem.variants)
    for name in names:
        table.add_column(name, justify="right")
    for problem in report.problems:
        cells = {variant.name: _speed(variant) for variant in problem.variants}
        table.add_row(
            Text(problem.shape.title),
            problem.routing.value,
            _ms(problem.bf16.both.median_ms),
            *(cells.get(name, NO_FIGURE) for name in names),
        )
    return table


def new_table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _problem_title(result: Result) -> str:
    smallest, largest = min(result.group_sizes), max(result.group_sizes)
    rows = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    return f"{result.shape.title}, {result.routing.value} routing, {rows} rows an expert"


def _add(
    table: Table,
    columns: Mapping[str, Callable[[T], str]],
    rows: Iterable[T | Failure],
    first_cells: Callable[[T], list[str]],
) -> None:
    for title in columns:
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        if isinstance(row, Failure):
            table.add_row(Text(row.name), _failed(row))
        else:
            table.add_row(*map(Text, first_cells(row)), *(figure(row) for figure in columns.values()))


def _speed(variant: Measurement | Failure) -> str | Text:
    return _failed(variant) if isinstance(variant, Failure) else f"{variant.speed_against_bf16:.2f}"


def _sqnr(variant: Measurement) -> str:
    return " ".join(f"{found.sqnr_db:.0f}" for found in variant.agreement.values())


def _failed(failure: Failure) -> Text:
    return Text("failed" if failure.is_ours else "failed (a peer)", style="red")


def _or_none(figure: T | None, written: Callable[[T], str]) -> str:
    return NO_FIGURE if figure is None else written(figure)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _us(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.1f}"


def _mib(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 10 else f"{mebibytes:.2f}"


def _share(floor_ms: float | None, time_ms: float) -> str:
    return NO_FIGURE if floor_ms is None else f"{floor_ms / time_ms:.0%}"
