"""What a monitor sees of one call of a layer that is sampled: small tensors, which stay on the device."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.autograd.expert_mlp import Experts, Plan
from fp8moe.autograd.weights import ExpertWeight
from fp8moe.config import ScaleFormat
from fp8moe.monitor import statistics
from fp8moe.monitor.checks import Checks
from fp8moe.operands import BLOCK, RowOperand, TokenGroups
from fp8moe.quantize import swiglu_reference

NUM_BLOCKS = 4
"""Blocks of 128 rows in a sample, and bands of 128 rows of a weight, at most."""
NUM_ELEMENTS = 2**20
"""Of which a sample has no more, if that leaves it one block: it is in fp32, several times."""


@dataclass
class Seen:
    """Of one layer in one step that is sampled."""

    step: int
    phase: float
    """From 0 to 1: where the sample lies."""
    operands: dict[str, Tensor] = field(default_factory=dict)
    """fp32 `(7,)` each, of `statistics.sums_of`, of the first call in the step."""
    tokens: Tensor | None = None
    """int64 `(E,)`: rows of each expert, of all calls in the step."""
    begun: set[str] = field(default_factory=set)
    """The prefixes of the calls that have begun."""


class Call:
    """An `Observation` of one call.

    Args:
        checks: of its results.
        seen: of the step.
    """

    def __init__(self, checks: Checks, seen: Seen) -> None:
        self._checks, self._seen = checks, seen
        self._prefix, self._counts = checks.prefix, checks.counts
        self._samples = self._prefix not in seen.begun or not self._counts
        seen.begun.add(self._prefix)
        self._tiles: dict[ScaleFormat, dict[str, Tensor]] = {}
        """What has been sampled and is not summed up yet: together that takes fewer launches."""

    def operand(
        self, name: str, x: Tensor, groups: TokenGroups | None, scale_format: ScaleFormat, *, rows: bool, tokens: bool
    ) -> None:  # fmt: skip
        """See `Observation`; so for all methods."""
        seen = self._sampled(is_forward=not name.startswith("d_"))
        if seen is None or not x.shape[0]:
            return
        with torch.no_grad():
            if groups is None:
                at_most = _num_blocks(x.shape[1]) * BLOCK
                sample = x[statistics.rows_of(x.shape[0], seen.phase, at_most, x.device)].float()
            else:
                if not groups.capacity:
                    return
                sample = statistics.taken(x, _Rows(groups, seen.phase, x.shape[1]).source)
            self._sample(name, sample, sample, scale_format, rows=rows, tokens=tokens and groups is not None)
            if name == "d_out" or (name == "d_output" and not rows):  # nothing else is sampled in this backward
                self._sum_up()

    def weight(self, name: str, weight: ExpertWeight, scale_format: ScaleFormat) -> None:
        seen = self._sampled(is_forward=True)
        if seen is None:
            return
        with torch.no_grad():
            tiles = {name: tiles for name, tiles in [(name, _weight_tiles(weight, seen.phase))] if tiles is not None}
            self._keep(tiles, scale_format)

    def gate_up(self, gate_up: Tensor, experts: Experts, plan: Plan) -> None:
        self.routed(experts.groups.ends)
        seen = self._sampled(is_forward=True)
        if seen is None:
            return
        with torch.no_grad():
            weights = {"w_gate_up": experts.gate_up, "w_down": experts.down}
            of_weights = {name: _weight_tiles(weight, seen.phase) for name, weight in weights.items()}
            self._keep({name: tiles for name, tiles in of_weights.items() if tiles is not None}, plan.scale_format)
            if not experts.groups.capacity:
                return
            rows = _Rows(experts.groups, seen.phase, gate_up.shape[1])
            act = plan.act.with_bias(experts.bias)
            values = statistics.taken(gate_up, rows.source)
            sample = swiglu_reference.swiglu(values, rows.weights(experts), act, rows.groups)
            self._sample("activation", sample, sample, plan.scale_format, rows=True, tokens=plan.wanted.w_down)

    def d_activation(self, d_activation: Tensor, gate_up: Tensor | RowOperand, experts: Experts, plan: Plan) -> None:
        seen = self._sampled(is_forward=False)
        if seen is None or not experts.groups.capacity:
            return
        with torch.no_grad():
            rows = _Rows(experts.groups, seen.phase, plan.padded_width)
            act = plan.act.with_bias(experts.bias)
            if isinstance(gate_up, RowOperand):
                values = statistics.taken_from_operand(gate_up, rows.padded, rows.source < 0)
            else:
                values = statistics.taken(gate_up, rows.source)
            d_act = statistics.taken(d_activation, rows.source)
            sample, _ = swiglu_reference.swiglu_backward(d_act, values, rows.weights(experts), act, rows.groups)
            self._sample(
                "d_gate_up", swiglu_reference.padded(sample, act), sample, plan.scale_format,
                rows=plan.wanted.x, tokens=plan.wanted.w_gate_up,
            )  # fmt: skip
            self._sum_up()

    def routed(self, ends: Tensor) -> None:
        if not self._counts:
            return
        with torch.no_grad():
            counts = torch.diff(ends.long(), prepend=ends.new_zeros(1, dtype=torch.int64))
            if self._seen.tokens is None:
                self._seen.tokens = counts
            elif not self._prefix or self._prefix.startswith("product0"):
                self._seen.tokens += counts

    def result(self, name: str, x: Tensor, *, hidden: Tensor | None = None, in_fp8: bool = True) -> None:
        self._checks.result(name, x, hidden=hidden, in_fp8=in_fp8)
        if name in ("out", "output"):
            with torch.no_grad():
                self._sum_up()

    def _sampled(self, *, is_forward: bool) -> Seen | None:
        """Where to put what a sample gives, if this call is sampled there."""
        return self._seen if self._samples and (self._counts or not is_forward) else None

    def _sample(
        self, name: str, rows_of: Tensor, tokens_of: Tensor, scale_format: ScaleFormat, *, rows: bool, tokens: bool
    ) -> None:  # fmt: skip
        tiles = self._tiles.setdefault(scale_format, {})
        if rows:
            tiles[f"{name}.rows"] = statistics.row_tiles(rows_of)
        if tokens:
            tiles[f"{name}.tokens"] = statistics.token_tiles(tokens_of)

    def _sum_up(self) -> None:
        for scale_format, tiles in self._tiles.items():
            self._keep(tiles, scale_format)
        self._tiles = {}

    def _keep(self, tiles: dict[str, Tensor], scale_format: ScaleFormat) -> None:
        if tiles:
            sums = statistics.sums_of([*tiles.values()], scale_format)
            self._seen.operands.update(zip([self._prefix + name for name in tiles], sums, strict=True))


class _Rows:
    """The sampled rows of a layer."""

    def __init__(self, groups: TokenGroups, phase: float, num_features: int) -> None:
        self.padded = statistics.padded_rows_of(groups, phase, _num_blocks(num_features))
        """int64 `(n,)`: which padded rows."""
        self.source = groups.row_source[self.padded].long()
        """int64 `(n,)`: which ragged rows, or tokens; -1 on padding."""
        self._all = groups

    @property
    def groups(self) -> TokenGroups:
        """Which expert each row of the sample belongs to."""
        numbers = torch.arange(len(self.source), dtype=torch.int32, device=self.source.device)
        source = torch.where(self.source < 0, -1, numbers)
        every, expert = self._all, self._all.row_expert[self.padded]
        return TokenGroups(len(numbers), every.ends, every.padded_ends, expert, source, source)

    def weights(self, experts: Experts) -> Tensor | None:
        """Those of the rows of the sample."""
        return None if experts.row_weights is None else experts.row_weights[self.source.clamp(min=0)]


def _num_blocks(num_features: int) -> int:
    return max(1, min(NUM_BLOCKS, NUM_ELEMENTS // (BLOCK * num_features)))


def _weight_tiles(weight: ExpertWeight, phase: float) -> Tensor | None:
    """Of bands of its parts by turns; None where FSDP has gathered codes, and there is nothing else."""
    parts = [part for part in weight.parts if type(part) is Tensor or type(part) is Parameter]
    if not parts:
        return None
    count = _num_blocks(parts[0].shape[2])
    bands = [_band(parts[number % len(parts)], (number + phase) / count) for number in range(count)]
    return statistics.weight_tiles(torch.stack(bands))


def _band(w: Tensor, place: float) -> Tensor:
    """fp32 `(128, K)`: of `w` `(E, N, K)`, the 128 rows of one expert's matrix that are at `place`, from 0 to 1, among
    all; filled up with zeros."""
    num_experts, n, _ = w.shape
    per_expert = (n + BLOCK - 1) // BLOCK
    expert, band = divmod(min(int(place * num_experts * per_expert), num_experts * per_expert - 1), per_expert)
    rows = w[expert, band * BLOCK : (band + 1) * BLOCK].float()
    return torch.nn.functional.pad(rows, (0, 0, 0, BLOCK - rows.shape[0]))
