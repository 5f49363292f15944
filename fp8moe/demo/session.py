"""A run from start to end: train every precision, and keep every step."""

from dataclasses import replace
from typing import Protocol

from fp8moe.demo.data import Corpus
from fp8moe.demo.interrupt import StopRequest
from fp8moe.demo.runs import Run
from fp8moe.demo.sampling import continue_text
from fp8moe.demo.settings import Precision
from fp8moe.demo.training import NonFiniteError, StepRecord, Trainer

SAMPLE_BYTES = 256
_PROMPT_BYTES = 128
_TEMPERATURE = 0.8


class Observer(Protocol):
    """Something that follows the progress of a run, such as a display."""

    def begin(self, precision: Precision, step: int) -> None:
        """Training of `precision` goes on from `step`."""

    def advance(self, precision: Precision, record: StepRecord) -> None:
        """A step was taken."""


def train(run: Run, corpus: Corpus, stop: StopRequest, observer: Observer) -> bool:
    """Train each precision of the run from where it stands to the end, or until `stop` is requested.

    Every step is recorded before the next begins. When it stops between steps, the checkpoint is that of the last one.

    Returns:
        Whether every precision has come to its end.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the checkpoint is that of the step before.
    """
    return all(_train(run, precision, corpus, stop, observer) for precision in run.config.precision)


def _train(run: Run, precision: Precision, corpus: Corpus, stop: StopRequest, observer: Observer) -> bool:
    if stop.requested:
        return False
    config = run.config
    trainer = Trainer(config, precision, corpus)
    saved = run.load_checkpoint(precision)
    if saved is not None:
        trainer.load_state_dict(saved)
    observer.begin(precision, trainer.step)
    with run.recorder(precision, trainer.step) as record:
        stopping = stop.requested  # read once a step, so that the checkpoint below is that of the last step
        while not (trainer.done or stopping):
            try:
                taken = trainer.train_step()
            except NonFiniteError:
                run.save_checkpoint(precision, trainer.state_dict())
                raise
            if trainer.done or _due(trainer.step, config.eval_every):
                taken = replace(taken, val_loss=trainer.validate())
            record(taken)
            observer.advance(precision, taken)
            stopping = stop.requested
            if trainer.done or stopping or _due(trainer.step, config.checkpoint_every):
                run.save_checkpoint(precision, trainer.state_dict())
    if trainer.done and not run.file(precision, "sample.txt").exists():
        prompt = bytes(corpus.validation[:_PROMPT_BYTES].tolist())
        text = continue_text(trainer.model, prompt, SAMPLE_BYTES, config.seq_len, _TEMPERATURE, config.seed)
        with run.replacing(precision, "sample.txt") as stream:
            stream.write(prompt + text)
    return trainer.done


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
