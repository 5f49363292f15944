"""The result of a run: the losses of each precision, and how far FP8 is from BF16."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from fp8moe.demo.settings import Precision
from fp8moe.demo.training import StepRecord

BASELINE: Precision = "bf16"

# Measured on five BF16 runs of the default size whose parameters differed by one part in a thousand at the start.
NOISE = "training amplifies rounding: at the default size BF16 runs end up to 1.6 % apart from that alone"

Records = Mapping[Precision, Sequence[StepRecord]]


@dataclass(frozen=True)
class PrecisionSummary:
    """One precision's training. Losses are in nats per byte; None: not measured yet."""

    steps: int
    first_loss: float | None
    """Of the first step."""
    last_loss: float | None
    """The mean over the last tenth of the steps."""
    val_loss: float | None
    """On the held-out text, when it was last measured."""
    tokens_per_second: float | None
    """Median over the steps."""
    seconds: float
    """In training steps alone."""
    train_gap: float | None
    """`loss / baseline loss - 1`, both the mean over the same steps: the last tenth of those that both have taken."""
    val_gap: float | None
    """`loss / baseline loss - 1` on the held-out text, at the last step where both were measured."""


def summarize(records: Records) -> dict[Precision, PrecisionSummary]:
    """The summary of every precision, each compared with the BF16 baseline if that was trained too."""
    baseline = records.get(BASELINE, ())
    return {
        precision: _summarize(steps, () if precision == BASELINE else baseline) for precision, steps in records.items()
    }


def to_json(status: str, summaries: Mapping[Precision, PrecisionSummary]) -> dict[str, Any]:
    return {
        "status": status,
        "loss_unit": "nats per byte",
        "baseline": BASELINE if BASELINE in summaries else None,
        "precisions": {precision: asdict(summary) for precision, summary in summaries.items()},
    }


def _summarize(steps: Sequence[StepRecord], baseline: Sequence[StepRecord]) -> PrecisionSummary:
    measured = [step.val_loss for step in steps if step.val_loss is not None]
    common = min(len(steps), len(baseline))
    train_gap = _last_mean(steps[:common]) / _last_mean(baseline[:common]) - 1 if common else None
    pairs = [
        (mine.val_loss, its.val_loss)
        for mine, its in zip(steps, baseline, strict=False)
        if mine.val_loss is not None and its.val_loss is not None
    ]
    return PrecisionSummary(
        steps=len(steps),
        first_loss=steps[0].loss if steps else None,
        last_loss=_last_mean(steps) if steps else None,
        val_loss=measured[-1] if measured else None,
        tokens_per_second=median(step.tokens_per_second for step in steps) if steps else None,
        seconds=sum(step.seconds for step in steps),
        train_gap=train_gap,
        val_gap=pairs[-1][0] / pairs[-1][1] - 1 if pairs else None,
    )


def _last_mean(steps: Sequence[StepRecord]) -> float:
    return fmean(step.loss for step in steps[-max(1, len(steps) // 10) :])
