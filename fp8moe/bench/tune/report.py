"""What the reader sees of a tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from fp8moe.bench.tables import new_table
from fp8moe.bench.tune.measure import Sample
from fp8moe.gemm.cost import CostModel, Costs


@dataclass(frozen=True)
class Verdict:
    """What a model makes of one sample, with cached weights or without."""

    title: str
    bf16_us: float
    fp8_us: float
    predicted_bf16_us: float
    predicted_fp8_us: float

    @property
    def takes_fp8(self) -> bool:
        """AUTO's choice."""
        return self.predicted_fp8_us < self.predicted_bf16_us

    @property
    def loss(self) -> float:
        """By what share the choice takes longer than the better of both."""
        return (self.fp8_us if self.takes_fp8 else self.bf16_us) / min(self.fp8_us, self.bf16_us) - 1


def verdicts(samples: Sequence[Sample], model: CostModel) -> list[Verdict]:
    """Two of each sample."""
    return [verdict for sample in samples for verdict in _verdicts(sample, model.costs(sample.layer))]


def worst(found: Sequence[Verdict]) -> str:
    """The largest loss in words."""
    verdict = max(found, key=lambda verdict: verdict.loss)
    return f"at most {verdict.loss:.1%} longer than the better of both" + (
        f": {verdict.title}" if verdict.loss > 0 else ""
    )


def verdict_table(found: Sequence[Verdict]) -> Table:
    """A line each, times in microseconds."""
    table = new_table("Forward and backward, by graph replay, us")
    table.add_column("op", no_wrap=True)
    for title in ("BF16", "predicted", "FP8", "predicted", "BF16 / FP8", "AUTO", "loss"):
        table.add_column(title, justify="right")
    for verdict in found:
        table.add_row(
            verdict.title,
            f"{verdict.bf16_us:.0f}",
            f"{verdict.predicted_bf16_us:.0f}",
            f"{verdict.fp8_us:.0f}",
            f"{verdict.predicted_fp8_us:.0f}",
            f"{verdict.bf16_us / verdict.fp8_us:.2f}",
            "FP8" if verdict.takes_fp8 else "BF16",
            f"{verdict.loss:.1%}" if verdict.loss > 0 else "",
        )
    return table


def as_python(model: CostModel) -> str:
    """An entry of `fp8moe.gemm.cost.SHIPPED`, indented as it stands there."""
    lines = ["CostModel(", f'    device="{model.device}",', f'    measured="{model.measured}",']
    for layer, name in ((False, "product"), (True, "layer")):
        lines += [f"    {name}=Costs(", *_as_python(model.costs(layer)), "    ),"]
    return "\n".join(f"        {line}" for line in [*lines, "),"])


def _as_python(costs: Costs) -> Iterator[str]:
    for name, cost in (("bf16", costs.bf16), ("fp8", costs.fp8), ("fp8_cached", costs.fp8_cached)):
        yield f"        {name}=Cost({', '.join(map(repr, cost.coefficients))}),"


def _verdicts(sample: Sample, costs: Costs) -> Iterator[Verdict]:
    for cached in (False, True):
        yield Verdict(
            f"{sample.title}, cached" if cached else sample.title,
            sample.bf16_us,
            sample.fp8_with(cached),
            costs.bf16.predict_us(sample.work),
            costs.fp8_with(cached).predict_us(sample.work),
        )
