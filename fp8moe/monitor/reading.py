"""What a monitor has measured, on the host."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fp8moe.monitor.thresholds import Alert

WIDTH = 12


@dataclass(frozen=True)
class OperandReading:
    """Of an operand, on a sample; `fp8moe/monitor/statistics.py` has the formulas."""

    underflow: float
    """Share of the values that FP8 makes zero."""
    saturation: float
    """Share of the values at the largest code, 448."""
    sqnr_db: float | None
    """Signal to quantization noise, in dB; None if all are zeros."""
    amax: float
    """The largest magnitude."""
    amax_drift: float
    """`log2(amax)` less its running mean over the readings before, in which each weighs 0.9 of the next. 0 in the first
    reading, and where amax is 0."""
    not_finite: float
    """Share of the values that are NaN or infinite."""


@dataclass(frozen=True)
class LayerReading:
    """Of a layer in one step."""

    operands: Mapping[str, OperandReading]
    """By name, such as `hidden.rows`: as an operand whose tiles are 128 features of a row, or `d_output.tokens`: 128
    rows of a feature. Empty where the layer ran in BF16."""
    tokens_per_expert: tuple[int, ...]
    """Rows of each expert, of all calls in the step; of this rank."""
    dead_experts: tuple[int, ...]
    """Those without a row in this reading and the ones before it; see `Thresholds.dead_after`."""

    @property
    def max_load(self) -> float:
        """Rows of the busiest expert, over the mean of all; 0 if there are none."""
        total = sum(self.tokens_per_expert)
        return max(self.tokens_per_expert) * len(self.tokens_per_expert) / total if total else 0.0


@dataclass(frozen=True)
class NotFinite:
    """The first result that was NaN or infinite."""

    step: int
    layer: str
    result: str
    """`hidden` is what came into the layer, `output` what it returned; `d_output` and `d_hidden` are their gradients;
    of a single product `out` and `d_a`."""

    @property
    def alert(self) -> Alert:
        """Of it."""
        return Alert(self.step, self.layer, self.result, "result", str(self))

    def __str__(self) -> str:
        return f"{self.layer}: {self.result} is NaN or infinite from step {self.step} on"


@dataclass(frozen=True)
class Reading:
    """Of all layers in one step. `print` it, or give `as_dict()` to any logger."""

    step: int
    layers: Mapping[str, LayerReading]
    """By name, those that were seen."""
    not_finite: NotFinite | None
    """What was not finite first, in any step so far; results are checked in each step."""
    alerts: tuple[Alert, ...]
    """All thresholds that are passed in this reading."""
    unseen: tuple[str, ...]
    """Layers that are watched, and were not seen in this step: they ran in compiled code or in a CUDA graph, fp8moe did
    not compute them, or they did not run."""

    def as_dict(self) -> dict[str, float]:
        """All numbers, by names such as `model.layers.3.experts/d_output.rows/underflow`, without what is None.

        Of experts there are `<layer>/experts/max_load`, `.../min_tokens` and `.../dead`. `monitor/alerts` is their
        number, `monitor/first_not_finite_step` is there if anything was not finite.
        """
        numbers: dict[str, float] = {}
        for name, layer in self.layers.items():
            for operand, reading in layer.operands.items():
                for entry in fields(reading):
                    value = getattr(reading, entry.name)
                    if value is not None:
                        numbers[f"{name}/{operand}/{entry.name}"] = value
            if layer.tokens_per_expert:
                numbers[f"{name}/experts/max_load"] = layer.max_load
                numbers[f"{name}/experts/min_tokens"] = min(layer.tokens_per_expert)
                numbers[f"{name}/experts/dead"] = len(layer.dead_experts)
        numbers["monitor/alerts"] = len(self.alerts)
        if self.not_finite is not None:
            numbers["monitor/first_not_finite_step"] = self.not_finite.step
        return numbers

    def as_json(self) -> dict[str, Any]:
        """Everything, nested, of what JSON has."""
        return {
            "step": self.step,
            "layers": {
                name: {
                    "operands": {operand: vars(reading) for operand, reading in layer.operands.items()},
                    "tokens_per_expert": [*layer.tokens_per_expert],
                    "dead_experts": [*layer.dead_experts],
                }
                for name, layer in self.layers.items()
            },
            "not_finite": None if self.not_finite is None else vars(self.not_finite),
            "alerts": [alert.message for alert in self.alerts],
            "unseen": [*self.unseen],
        }

    @property
    def worst_sqnr_db(self) -> float | None:
        """Of all operands of all layers."""
        found = [x.sqnr_db for layer in self.layers.values() for x in layer.operands.values() if x.sqnr_db is not None]
        return min(found, default=None)

    @property
    def worst_underflow(self) -> float | None:
        """Of all operands of all layers."""
        return max((x.underflow for layer in self.layers.values() for x in layer.operands.values()), default=None)

    def summary(self) -> str:
        """One line."""
        parts = []
        if self.worst_sqnr_db is not None and self.worst_underflow is not None:
            parts.append(f"SQNR {self.worst_sqnr_db:.1f} dB or more, underflow {self.worst_underflow:.2%} or less")
        loads = [layer.max_load for layer in self.layers.values() if layer.tokens_per_expert]
        if loads:
            dead = sum(len(layer.dead_experts) for layer in self.layers.values())
            parts.append(f"busiest expert {max(loads):.1f}x the mean, {dead} dead")
        parts += [alert.message for alert in self.alerts]
        if self.unseen:
            parts.append(f"{len(self.unseen)} layers not seen")
        return "; ".join(parts) or "nothing seen"

    def __str__(self) -> str:
        """A table."""
        names = [entry.name for entry in fields(OperandReading)]
        lines = [f"step {self.step}"]
        for name, layer in self.layers.items():
            lines.append(name)
            if layer.operands:
                lines.append(f"  {'':20}{''.join(f'{title:>{WIDTH}}' for title in names)}")
            for operand, reading in layer.operands.items():
                values = [getattr(reading, title) for title in names]
                lines.append(f"  {operand:20}{''.join(f'{_text(value):>{WIDTH}}' for value in values)}")
            if layer.tokens_per_expert:
                low, high = min(layer.tokens_per_expert), max(layer.tokens_per_expert)
                dead = f"; dead: {', '.join(map(str, layer.dead_experts))}" if layer.dead_experts else ""
                lines.append(f"  rows per expert: {low} to {high}, {layer.max_load:.2f} times the mean at most{dead}")
        lines += [alert.message for alert in self.alerts]
        if self.unseen:
            lines.append(f"not seen: {', '.join(self.unseen)}")
        return "\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
