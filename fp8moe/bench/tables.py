"""The figures as tables for a terminal."""

from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8moe.bench.ops import Failure, Measurement
from fp8moe.bench.record import Report
from fp8moe.bench.session import ProblemResult

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


def variant_table(result: ProblemResult) -> Table:
    """Each variant of one problem, BF16 first."""
    table = new_table(_problem_title(result))
    table.add_column("variant", no_wrap=True)
    table.add_column("kernels", overflow="fold")
    names = fill(" ".join(result.bf16.agreement), NAMES_WIDTH)
    for title in (
        "forward\nms", "backward\nms", "both\nms", "speed\n/ BF16", "floor\n/ time", "graph\nms",
        "saved\nMiB", "saved\n/ BF16", "peak\nMiB", "host\nus", f"SQNR dB\n{names}",
    ):  # fmt: skip
        table.add_column(title, justify="right", overflow="fold")
    for variant in (result.bf16, *result.variants):
        if isinstance(variant, Failure):
            table.add_row(Text(variant.name), _failed(variant))
            continue
        table.add_row(
            Text(variant.name),
            Text(variant.computed_by),
            _ms(variant.forward.median_ms),
            _ms(variant.backward.median_ms),
            _ms(variant.both.median_ms),
            f"{result.speed(variant):.2f}",
            _share(variant.both_floor_ms, variant.both.median_ms),
            NO_FIGURE if variant.graph is None else _ms(variant.graph.median_ms),
            _mib(variant.saved_row_bytes),
            f"{result.saved_ratio(variant):.2f}",
            NO_FIGURE if variant.peak_bytes is None else _mib(variant.peak_bytes),
            NO_FIGURE if variant.host_us is None else f"{variant.host_us:.0f}",
            "" if variant is result.bf16 else " ".join(f"{found.sqnr_db:.0f}" for found in variant.agreement.values()),
        )
    return table


def notes(result: ProblemResult) -> list[Text]:
    """What the variant table has no room for: why a figure is missing, and how steady the machine was."""
    lines = [
        Text(f"Timed by turns; meanwhile BF16's time for both changed to {result.bf16.both.drift:.3f} of what it was.")
    ]
    reasons: dict[str, list[str]] = {}
    for variant in (result.bf16, *result.measured):
        if variant.no_graph_because:
            reasons.setdefault(variant.no_graph_because, []).append(variant.name)
    lines += [Text(f"No graph time for {', '.join(names)}: {reason}") for reason, names in reasons.items()]
    lines += [Text(f"{failure.name}: {failure.error}", style="red") for failure in result.failures]
    return lines


def kernel_table(result: ProblemResult) -> Table:
    """Each kernel of one problem."""
    table = new_table(f"{_problem_title(result)}: kernels")
    table.add_column("kernel")
    for title in ("time\nus", "GB/s", "TFLOP/s", "floor\nus", "floor\n/ time", "SQNR\ndB"):
        table.add_column(title, justify="right", overflow="fold")
    for kernel in result.kernels:
        if isinstance(kernel, Failure):
            table.add_row(Text(kernel.name), _failed(kernel))
            continue
        table.add_row(
            Text(kernel.name),
            _us(kernel.timing.median_ms),
            f"{kernel.gb_s:.0f}",
            f"{kernel.tflop_s:.3g}" if kernel.flops else NO_FIGURE,
            NO_FIGURE if kernel.floor_ms is None else _us(kernel.floor_ms),
            _share(kernel.floor_ms, kernel.timing.median_ms),
            f"{kernel.sqnr_db:.0f}",
        )
    return table


def summary_table(report: Report) -> Table:
    """One line a problem: BF16's time and everybody's speed against it."""
    table = new_table(f"{report.what.title}, forward and backward: speed against BF16")
    letters = ",".join(report.problems[0].shape.LETTERS)
    table.add_column(f"shape ({letters})")
    table.add_column("routing")
    table.add_column("BF16 ms", justify="right")
    names = dict.fromkeys(variant.name for problem in report.problems for variant in problem.variants)
    for name in names:
        table.add_column(name, justify="right")
    for problem in report.problems:
        cells = {variant.name: _speed(problem, variant) for variant in problem.variants}
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


def _problem_title(result: ProblemResult) -> str:
    smallest, largest = min(result.group_sizes), max(result.group_sizes)
    rows = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    return f"{result.shape.title}, {result.routing.value} routing, {rows} rows an expert"


def _speed(problem: ProblemResult, variant: Measurement | Failure) -> str | Text:
    return _failed(variant) if isinstance(variant, Failure) else f"{problem.speed(variant):.2f}"


def _failed(failure: Failure) -> Text:
    return Text("failed" if failure.is_ours else "failed (a peer)", style="red")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _us(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.1f}"


def _mib(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 10 else f"{mebibytes:.2f}"


def _share(floor_ms: float | None, time_ms: float) -> str:
    return NO_FIGURE if floor_ms is None else f"{floor_ms / time_ms:.0%}"
