"""A run from start to end: train every precision, and keep every step."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fp8moe.demo.data import Corpus
from fp8moe.demo.loop import Stop, steps
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import Precision
from fp8moe.demo.training import StepRecord, Trainer
from fp8moe.monitor import Monitor, Reading, watch

_SAMPLE = 256
_PROMPT = 128


def train(run: Run, corpus: Corpus, stop: Stop, console: Console) -> bool:
    """Train each precision of the run from where it stands to the end, or until `stop` is requested.

    Every step is recorded before the next begins. When it stops between steps, the checkpoint is that of the last one.

    Returns:
        Whether every precision has come to its end.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    state = "{task.fields[state]}"
    columns = ("{task.description:>4}", BarColumn(), MofNCompleteColumn(), state, TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        return all(_train(run, precision, corpus, stop, progress) for precision in run.config.precisions)


def _train(run: Run, precision: Precision, corpus: Corpus, stop: Stop, progress: Progress) -> bool:
    total = run.config.steps
    trainer = Trainer(run.config, precision, corpus)
    task = progress.add_task(precision.upper(), total=total, state="")
    watched = _WatchedSteps(trainer, progress) if precision == "fp8" and not run.config.compile else None
    for record in steps(run, trainer, stop, watched):
        state = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        if "val_loss" in record:
            at = f"{precision.upper():>4} {record['step']}/{total}"
            progress.console.print(f"{at}  {state}  held-out text {record['val_loss']:.3f}", highlight=False)
        progress.update(task, completed=record["step"], state=state)
    progress.update(task, completed=trainer.step)
    if watched:
        watched.close()
    if trainer.done:
        prompt = corpus.validation[:_PROMPT].tolist()
        written = prompt + trainer.sample(prompt, _SAMPLE)
        run.file(precision, "sample.txt").write_bytes(corpus.decode(written))
    return trainer.done


class _WatchedSteps:
    """Takes steps of a trainer, and shows what a monitor reads of them, in one line each."""

    def __init__(self, trainer: Trainer, progress: Progress) -> None:
        self._trainer, self._progress = trainer, progress
        self._monitor: Monitor | None = None

    def __call__(self) -> StepRecord:
        if self._monitor is None:  # only now: a checkpoint has been loaded before the first step
            self._monitor = watch(
                self._trainer.model, optimizer=self._trainer.optimizer, steps_taken=self._trainer.step,
                writers=[self._show], warn=False,
            )  # fmt: skip
        try:
            return self._trainer.train_step()
        except FloatingPointError:
            if (reading := self._monitor.read()) and reading.not_finite:
                self._print(str(reading.not_finite))
            raise

    def close(self) -> None:
        """Stop watching."""
        if self._monitor:
            self._monitor.close()

    def _show(self, reading: Reading) -> None:
        self._print(f"{reading.step}/{self._trainer.config.steps}  {reading.summary()}")

    def _print(self, text: str) -> None:
        self._progress.console.print(f" FP8 {text}", highlight=False)
