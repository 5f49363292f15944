"""What the reader sees of a tuning."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from fp8moe.bench.tables import new_table
from fp8moe.bench.tune.loss import Loss
from fp8moe.bench.tune.measure import Sample
from fp8moe.gemm.cost import CostModel
from fp8moe.gemm.select import fp8_pays


@dataclass(frozen=True)
class Verdict:
    """What a model makes of one sample, with cached weights or without, in microseconds of eager code."""

    title: str
    bf16_us: float
    bf16_predicted_us: float
    fp8_us: float
    fp8_predicted_us: float
    takes_fp8: bool
    """AUTO's choice."""

    @property
    def loss(self) -> float:
        """By what share the choice takes longer than the better of both."""
        return (self.fp8_us if self.takes_fp8 else self.bf16_us) / min(self.fp8_us, self.bf16_us) - 1


def verdicts(samples: Sequence[Sample], model: CostModel, measured: CostModel) -> list[Verdict]:
    """Two of each sample.

    Args:
        samples: what is judged.
        model: by whose predictions AUTO chooses.
        measured: the model fitted to the samples, whose host's times are the measured ones.
    """
    found = []
    for sample, cached in ((sample, cached) for sample in samples for cached in (False, True)):
        costs, hosts = model.costs(sample.layer), measured.costs(sample.layer)
        found.append(
            Verdict(
                f"{sample.title}, cached" if cached else sample.title,
                max(sample.bf16_us, hosts.bf16.host),
                costs.bf16.predict_us(sample.work),
                max(sample.fp8_cached_us if cached else sample.fp8_us, hosts.fp8_with(cached).host),
                costs.fp8_with(cached).predict_us(sample.work),
                fp8_pays(costs, sample.work, cached),
            )
        )
    return found


def verdict_table(found: Sequence[Verdict]) -> Table:
    """A line each, times in microseconds."""
    table = new_table("Forward and backward, us: the longer of the device by graph replay and the host")
    table.add_column("op", no_wrap=True)
    for title in ("BF16", "predicted", "FP8", "predicted", "AUTO", "loss"):
        table.add_column(title, justify="right")
    for one in found:
        times = (one.bf16_us, one.bf16_predicted_us, one.fp8_us, one.fp8_predicted_us)
        loss = f"{one.loss:.1%}" if one.loss > 0 else ""
        table.add_row(one.title, *(f"{us:.0f}" for us in times), "FP8" if one.takes_fp8 else "BF16", loss)
    return table


def loss_table(losses: Sequence[Loss]) -> Table:
    """A line each, times in microseconds."""
    table = new_table("Forward and backward near the break-even, us, in eager code: AUTO by this model beside PyTorch")
    table.add_column("op", no_wrap=True)
    table.add_column("AUTO takes")
    for title in ("PyTorch", "AUTO", "AUTO / PyTorch"):
        table.add_column(title, justify="right")
    for loss in losses:
        table.add_row(loss.title, loss.taken, f"{loss.pytorch_us:.0f}", f"{loss.auto_us:.0f}", f"{loss.ratio:.2f}")
    return table
