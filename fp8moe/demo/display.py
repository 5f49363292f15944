"""What the reader sees while a run trains."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fp8moe.demo.runs import Run
from fp8moe.demo.settings import Precision
from fp8moe.demo.training import StepRecord

_SMOOTHING = 0.95  # of the loss beside the bar, as an exponential mean
_LINES = 10  # a precision, where there is no terminal for a bar


class ProgressDisplay:
    """A bar for each precision with its loss and rate; where the output is no terminal, a line now and then."""

    def __init__(self, console: Console, run: Run) -> None:
        self._console = console
        self._steps = run.config.steps
        self._loss: dict[Precision, float] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description:>4}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[Precision, TaskID] = {
            precision: self._progress.add_task(precision.upper(), total=self._steps, start=False, state="waiting")
            for precision in run.config.precision
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, precision: Precision, step: int) -> None:
        task = self._tasks[precision]
        self._progress.update(task, completed=step, state="" if step < self._steps else "done")
        if step < self._steps:
            self._progress.start_task(task)

    def advance(self, precision: Precision, record: StepRecord) -> None:
        previous = self._loss.get(precision, record.loss)
        loss = self._loss[precision] = _SMOOTHING * previous + (1 - _SMOOTHING) * record.loss
        state = f"loss {loss:.3f}  {record.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._tasks[precision], completed=record.step, state=state)
        if record.step == self._steps:
            self._progress.stop_task(self._tasks[precision])
        if not self._console.is_terminal and record.step % max(1, self._steps // _LINES) == 0:
            self._console.print(f"{precision.upper():>4} {record.step}/{self._steps}  {state}", highlight=False)
