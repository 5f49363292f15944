"""A run from start to end: train every precision, and keep every step."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fp8moe.demo.data import Corpus
from fp8moe.demo.interrupt import StopRequest
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import Precision
from fp8moe.demo.training import Trainer
from fp8moe.monitor import Monitor, Reading, watch

_SAMPLE_BYTES = 256
_PROMPT_BYTES = 128


def train(run: Run, corpus: Corpus, stop: StopRequest, console: Console) -> bool:
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


def _train(run: Run, precision: Precision, corpus: Corpus, stop: StopRequest, progress: Progress) -> bool:
    config = run.config
    trainer = Trainer(config, precision, corpus)
    saved = run.load_checkpoint(precision)
    if saved is not None:
        trainer.load_state_dict(saved)
    run.rewind(precision, trainer.step)
    task = progress.add_task(precision.upper(), completed=trainer.step, total=config.steps, state="")
    monitor = _watch(trainer, progress) if precision == "fp8" and not config.compile else None
    while not (trainer.done or stop.requested):
        try:
            record = trainer.train_step()
        except FloatingPointError:
            if monitor and (reading := monitor.read()) and reading.not_finite:
                progress.console.print(f" FP8 {reading.not_finite}", highlight=False)
            raise
        state = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        if trainer.done or _due(trainer.step, config.eval_every):
            record["val_loss"] = trainer.validate()
            at = f"{precision.upper():>4} {trainer.step}/{config.steps}"
            progress.console.print(f"{at}  {state}  held-out text {record['val_loss']:.3f}", highlight=False)
        run.append(precision, record)
        progress.update(task, completed=trainer.step, state=state)
        if _due(trainer.step, config.checkpoint_every):
            run.save_checkpoint(precision, trainer.state_dict())
    if monitor:
        monitor.close()
    run.save_checkpoint(precision, trainer.state_dict())
    if trainer.done:
        prompt = bytes(corpus.validation[:_PROMPT_BYTES].tolist())
        run.file(precision, "sample.txt").write_bytes(prompt + trainer.sample(prompt, _SAMPLE_BYTES))
    return trainer.done


def _watch(trainer: Trainer, progress: Progress) -> Monitor:
    """Shows each reading, in one line."""

    def show(reading: Reading) -> None:
        at = f" FP8 {reading.step}/{trainer.config.steps}"
        progress.console.print(f"{at}  {reading.summary()}", highlight=False)

    return watch(
        trainer.model, optimizer=trainer.optimizer, steps_taken=trainer.step, writers=[show], warn=False
    )  # fmt: skip


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
