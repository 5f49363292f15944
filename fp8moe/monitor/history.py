"""From what was measured in a step to a reading, by what was measured before."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from fp8moe.monitor.reading import LayerReading, NotFinite, OperandReading, Reading
from fp8moe.monitor.statistics import NAMES
from fp8moe.monitor.thresholds import Alert, Thresholds

DECAY = 0.9
"""The weight of a reading in the running mean of amax, of that of the next one."""


@dataclass(frozen=True)
class Measured:
    """Of one layer in one step, on the host."""

    operands: Mapping[str, Sequence[float]]
    """By name, `statistics.NAMES`."""
    tokens: Sequence[int]


@dataclass
class _Mean:
    """Weighted so that the first values do not count for more than they are."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.total, self.weight = DECAY * self.total + value, DECAY * self.weight + 1


@dataclass
class History:
    """What readings are compared with."""

    thresholds: Thresholds
    not_finite: NotFinite | None = None
    """The first so far."""
    _log2_amax: dict[tuple[str, str], _Mean] = field(default_factory=dict)
    _idle: dict[str, list[int]] = field(default_factory=dict)
    """Of each expert of a layer: how many readings, up to the last, it has had no row."""

    def reading(self, step: int, measured: Mapping[str, Measured], unseen: Sequence[str]) -> Reading:
        """The reading of a step, which is later than all before."""
        layers = {
            name: LayerReading(
                {operand: self._operand(name, operand, values) for operand, values in layer.operands.items()},
                tuple(layer.tokens),
                self._dead(name, layer.tokens),
            )
            for name, layer in measured.items()
        }
        return Reading(step, layers, self.not_finite, tuple(self._alerts(step, layers)), tuple(unseen))

    def _operand(self, layer: str, operand: str, values: Sequence[float]) -> OperandReading:
        by_name = dict(zip(NAMES, values, strict=True))
        sqnr_db, amax, drift = by_name["sqnr_db"], by_name["amax"], 0.0
        if amax > 0:
            mean = self._log2_amax.setdefault((layer, operand), _Mean())
            if mean.weight:
                drift = math.log2(amax) - mean.total / mean.weight
            mean.add(math.log2(amax))
        return OperandReading(
            by_name["underflow"], by_name["saturation"], None if math.isnan(sqnr_db) else sqnr_db, amax, drift,
            by_name["not_finite"],
        )  # fmt: skip

    def _dead(self, layer: str, tokens: Sequence[int]) -> tuple[int, ...]:
        limit = self.thresholds.dead_after
        idle = self._idle.setdefault(layer, [0] * len(tokens))
        for expert, count in enumerate(tokens):
            idle[expert] = 0 if count else idle[expert] + 1
        return tuple(expert for expert, count in enumerate(idle) if limit is not None and count >= limit)

    def _alerts(self, step: int, layers: Mapping[str, LayerReading]) -> list[Alert]:
        found = []
        if self.not_finite is not None:
            found.append(self.not_finite.alert)
        if not layers:
            text = (
                f"no layer was seen at step {step}: they ran in compiled code or in a CUDA graph, fp8moe did not "
                "compute them, or none ran"
            )
            found.append(Alert(step, "", "layers", "unseen", text))
        for name, layer in layers.items():
            for operand, reading in layer.operands.items():
                for entry in fields(reading):
                    value = getattr(reading, entry.name)
                    passed = None if value is None else self.thresholds.passed_by(entry.name, value)
                    if passed:
                        text = f"{name}: {entry.name} of {operand} is {value:.3g}, {passed}, at step {step}"
                        found.append(Alert(step, name, operand, entry.name, text))
            if layer.dead_experts:
                limit, who = self.thresholds.dead_after, ", ".join(map(str, layer.dead_experts))
                text = f"{name}: no tokens for expert {who} in the last {limit} readings, at step {step}"
                found.append(Alert(step, name, "experts", "dead_after", text))
        return found
