"""The loop: steps of one precision of a run, each on disk before the next begins."""

from collections.abc import Callable, Iterator
from typing import Protocol

from fp8moe.demo.runs import Run
from fp8moe.demo.training import StepRecord, Trainer


class Stop(Protocol):
    """Something that may ask training to stop between two steps: a signal, a clock."""

    @property
    def requested(self) -> bool: ...


def steps(
    run: Run, trainer: Trainer, stop: Stop, take: Callable[[], StepRecord] | None = None, keep_last: bool = True
) -> Iterator[StepRecord]:
    """Train from where the run stands to its end, or until `stop` is requested, and record every step.

    Where it stops, the checkpoint is that of the last step.

    Args:
        take: takes a step of the trainer; `trainer.train_step` by default.
        keep_last: whether there is a checkpoint of the end, too.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    config, precision = run.config, trainer.precision
    take = trainer.train_step if take is None else take
    saved = run.load_checkpoint(precision)
    if saved is not None:
        trainer.load_state_dict(saved)
        del saved  # as large as the trainer
    run.rewind(precision, trainer.step)
    while not (trainer.done or stop.requested):
        record = take()
        if trainer.done or due(trainer.step, config.eval_every):
            record["val_loss"] = trainer.validate()
        run.append(precision, record)
        yield record
        if due(trainer.step, config.checkpoint_every):
            run.save_checkpoint(precision, trainer.state_dict())
    if keep_last or not trainer.done:
        run.save_checkpoint(precision, trainer.state_dict())


def due(step: int, every: int) -> bool:
    """Whether what is done `every` so many steps is done after this one; never if that is 0."""
    return every > 0 and step % every == 0
