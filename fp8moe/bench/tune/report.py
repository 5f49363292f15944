"""What the reader sees of a tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from fp8moe.bench.tables import new_table
from fp8moe.bench.tune.measure import Sample
from fp8moe.gemm.cost import CostModel, Costs
from fp8moe.gemm.select import fp8_pays


@dataclass(frozen=True)
class Times:
    """Of one way, in microseconds."""

    device_us: float
    """By graph replay."""
    host_us: float
    """The median of what launching took for shapes of this kind."""
    predicted_us: float

    @property
    def us(self) -> float:
        """In eager code."""
        return max(self.device_us, self.host_us)


@dataclass(frozen=True)
class Verdict:
    """What a model makes of one sample, with cached weights or without."""

    title: str
    bf16: Times
    fp8: Times
    takes_fp8: bool
    """AUTO's choice."""

    @property
    def loss(self) -> float:
        """By what share the choice takes longer than the better of both."""
        return (self.fp8 if self.takes_fp8 else self.bf16).us / min(self.fp8.us, self.bf16.us) - 1


def verdicts(samples: Sequence[Sample], model: CostModel, measured: CostModel) -> list[Verdict]:
    """Two of each sample.

    Args:
        samples: what is judged.
        model: by whose predictions AUTO chooses.
        measured: the model fitted to the samples, whose host's times are the measured ones.
    """
    return [
        verdict
        for sample in samples
        for verdict in _verdicts(sample, model.costs(sample.layer), measured.costs(sample.layer))
    ]


def worst(found: Sequence[Verdict]) -> str:
    """The largest loss in words."""
    verdict = max(found, key=lambda verdict: verdict.loss)
    return f"at most {verdict.loss:.1%} longer than the better of both" + (
        f": {verdict.title}" if verdict.loss > 0 else ""
    )


def verdict_table(found: Sequence[Verdict]) -> Table:
    """A line each, times in microseconds."""
    table = new_table("Forward and backward, us: on the device by graph replay, on the host, the larger predicted")
    table.add_column("op", no_wrap=True)
    for title in ("BF16", "host", "predicted", "FP8", "host", "predicted", "BF16 / FP8", "AUTO", "loss"):
        table.add_column(title, justify="right")
    for verdict in found:
        table.add_row(
            verdict.title,
            *(
                f"{us:.0f}"
                for times in (verdict.bf16, verdict.fp8)
                for us in (times.device_us, times.host_us, times.predicted_us)
            ),
            f"{verdict.bf16.us / verdict.fp8.us:.2f}",
            "FP8" if verdict.takes_fp8 else "BF16",
            f"{verdict.loss:.1%}" if verdict.loss > 0 else "",
        )
    return table


def _verdicts(sample: Sample, costs: Costs, measured: Costs) -> Iterator[Verdict]:
    bf16 = Times(sample.bf16_us, measured.bf16.host, costs.bf16.predict_us(sample.work))
    for cached in (False, True):
        fp8, host_us = costs.fp8_with(cached), measured.fp8_with(cached).host
        yield Verdict(
            f"{sample.title}, cached" if cached else sample.title,
            bf16,
            Times(sample.fp8_with(cached), host_us, fp8.predict_us(sample.work)),
            fp8_pays(costs, sample.work, cached),
        )
