"""What a monitor sees of one call of a layer that is sampled: small tensors, which stay on the device."""

from collections.abc import Iterator, Sequence
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
from fp8moe.quantize.sample_sums import MAX_BLOCKS, NUM_SUMS, add_sample_sums

NUM_BLOCKS = MAX_BLOCKS
"""Blocks of 128 rows in a sample, and bands of 128 rows of a weight, at most."""
NUM_ELEMENTS = 2**20
"""Of which a sample has no more, if that leaves it one block: of activations it is in fp32, several times."""
ROWS_AT_ONCE = 16
"""Of `Seen.sums`: as many as a layer needs."""


@dataclass
class Seen:
    """Of one layer in one step that is sampled."""

    step: int
    phase: float
    """From 0 to 1: where the sample lies."""
    tokens: Tensor | None = None
    """int64 `(E,)`: the end row of each expert, summed over all calls in the step."""
    begun: set[str] = field(default_factory=set)
    """The prefixes of the calls that have begun."""
    rows: dict[str, int] = field(default_factory=dict)
    """Of `sums`, by operand: that of its last call in the step that has been sampled."""
    sums: list[Tensor] = field(default_factory=list)
    """fp64 `(16, 7)` each: `sample_sums`, in one transfer for all operands."""
    _used: int = 0

    def row(self, operand: str, device: torch.device) -> Tensor:
        """Zeros `(7,)`, to add its sums to."""
        place = self._used % ROWS_AT_ONCE
        if not place:
            self.sums.append(torch.zeros(ROWS_AT_ONCE, NUM_SUMS, dtype=torch.float64, device=device))
        self.rows[operand] = self._used
        self._used += 1
        return self.sums[-1][place]


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
        self._padded: dict[int, Tensor] = {}
        self._layer_rows: dict[int, _Rows] = {}

    def operand(
        self, name: str, x: Tensor, groups: TokenGroups | None, scale_format: ScaleFormat, *, rows: bool, tokens: bool
    ) -> None:  # fmt: skip
        """See `Observation`; so for all methods."""
        if not self._is_sampled(is_forward=not name.startswith("d_")) or not x.shape[0]:
            return
        with torch.no_grad():
            count = _num_blocks(x.shape[1])
            if groups is not None:
                if groups.capacity:
                    source = groups.row_source[self._padded_rows(groups, count)].long()
                    self._measure(name, x, source, (), scale_format, rows=rows, tokens=tokens)
            elif x.shape[0] <= count * BLOCK:
                self._measure(name, x, None, range(-(-x.shape[0] // BLOCK)), scale_format, rows=rows, tokens=False)
            else:
                source = statistics.rows_of(x.shape[0], self._seen.phase, count * BLOCK, x.device)
                self._measure(name, x, source, (), scale_format, rows=rows, tokens=False)

    def weight(self, name: str, weight: ExpertWeight, scale_format: ScaleFormat) -> None:
        if not self._is_sampled(is_forward=True):
            return
        with torch.no_grad():
            sums = None
            for part, bands in _bands(weight, self._seen.phase):
                sums = self._seen.row(self._prefix + name, part.device) if sums is None else sums
                add_sample_sums(part, None, bands, scale_format, by_block=sums)

    def gate_up(self, gate_up: Tensor, experts: Experts, plan: Plan) -> None:
        self.routed(experts.groups.ends)
        self.weight("w_gate_up", experts.gate_up, plan.scale_format)
        self.weight("w_down", experts.down, plan.scale_format)
        if not self._is_sampled(is_forward=True) or not experts.groups.capacity:
            return
        with torch.no_grad():
            rows = self._rows_of(experts, gate_up.shape[1])
            act = plan.act.with_bias(experts.bias)
            sample = swiglu_reference.swiglu(rows.of(gate_up), rows.weights(experts), act, rows.groups)
            self._measure_all("activation", sample, plan.scale_format, rows=True, tokens=plan.wanted.w_down)

    def d_activation(self, d_activation: Tensor, gate_up: Tensor | RowOperand, experts: Experts, plan: Plan) -> None:
        if not self._is_sampled(is_forward=False) or not experts.groups.capacity:
            return
        with torch.no_grad():
            rows = self._rows_of(experts, plan.padded_width)
            act = plan.act.with_bias(experts.bias)
            values, d_act = rows.of(gate_up), rows.of(d_activation)
            sample = swiglu_reference.gate_up_gradient(d_act, values, rows.weights(experts), act, rows.groups)
            self._measure_all(
                "d_gate_up", swiglu_reference.padded(sample, act), plan.scale_format,
                rows=plan.wanted.x, tokens=plan.wanted.w_gate_up,
            )  # fmt: skip

    def routed(self, ends: Tensor) -> None:
        if not self._counts:
            return
        with torch.no_grad():
            if self._seen.tokens is None:
                self._seen.tokens = ends.to(torch.int64, copy=True)
            elif not self._prefix or self._prefix.startswith("product0"):
                self._seen.tokens += ends

    def result(self, name: str, x: Tensor, *, hidden: Tensor | None = None, in_fp8: bool = True) -> None:
        self._checks.result(name, x, hidden=hidden, in_fp8=in_fp8)

    def _is_sampled(self, *, is_forward: bool) -> bool:
        return self._samples and (self._counts or not is_forward)

    def _measure_all(self, name: str, x: Tensor, scale_format: ScaleFormat, *, rows: bool, tokens: bool) -> None:
        """`x`, whole blocks of 128 rows, is itself a sample."""
        self._measure(name, x, None, range(x.shape[0] // BLOCK), scale_format, rows=rows, tokens=tokens)

    def _measure(
        self, name: str, x: Tensor, source: Tensor | None, blocks: Sequence[int], scale_format: ScaleFormat, *,
        rows: bool, tokens: bool,
    ) -> None:  # fmt: skip
        by_row, by_token = (
            self._seen.row(f"{self._prefix}{name}.{kind}", x.device) if wanted else None
            for kind, wanted in (("rows", rows), ("tokens", tokens))
        )
        if rows or tokens:
            add_sample_sums(x, source, blocks, scale_format, by_row=by_row, by_token=by_token)

    def _padded_rows(self, groups: TokenGroups, count: int) -> Tensor:
        """`statistics.padded_rows_of`, which are the same for all operands of a call."""
        rows = self._padded.get(count)
        if rows is None:
            rows = self._padded[count] = statistics.padded_rows_of(groups, self._seen.phase, count)
        return rows

    def _rows_of(self, experts: Experts, num_features: int) -> "_Rows":
        """In backward those of forward."""
        count = _num_blocks(num_features)
        rows = self._layer_rows.get(count)
        if rows is None:
            padded = self._padded_rows(experts.groups, count)
            rows = self._layer_rows[count] = _Rows(experts.groups, padded, has_bias=experts.bias is not None)
        return rows


class _Rows:
    """The sampled rows of a layer. It lives as long as the graph, so it keeps nothing of the size of all rows.

    Args:
        groups: all rows.
        padded: int64 `(n,)`: which padded rows.
        has_bias: whether gate and up have one.
    """

    def __init__(self, groups: TokenGroups, padded: Tensor, *, has_bias: bool) -> None:
        source = groups.row_source[padded]
        self._padded = padded
        self._is_padding = source < 0
        self._source = source.clamp(min=0).long()
        self.groups = self._groups_of(groups) if has_bias else None
        """Which expert each row of the sample belongs to; None if there is no bias, which alone asks for it."""

    def of(self, x: Tensor | RowOperand) -> Tensor:
        """fp32: of `x`, `(M, D)` or padded; zeros on padding."""
        rows = statistics.taken_from_operand(x, self._padded) if isinstance(x, RowOperand) else x[self._source].float()
        return rows.masked_fill_(self._is_padding[:, None], 0.0)

    def _groups_of(self, groups: TokenGroups) -> TokenGroups:
        numbers = torch.arange(len(self._padded), dtype=torch.int32, device=self._padded.device)
        source = torch.where(self._is_padding, -1, numbers)
        expert = groups.row_expert[self._padded]
        return TokenGroups(len(numbers), groups.ends, groups.padded_ends, expert, source, source)

    def weights(self, experts: Experts) -> Tensor | None:
        """Those of the rows of the sample."""
        return None if experts.row_weights is None else experts.row_weights[self._source]


def _num_blocks(num_features: int) -> int:
    return max(1, min(NUM_BLOCKS, NUM_ELEMENTS // (BLOCK * num_features)))


def _bands(weight: ExpertWeight, phase: float) -> Iterator[tuple[Tensor, list[int]]]:
    """Of its parts `(E, N, K)` by turns, which blocks of 128 rows: evenly among those of all experts. Nothing where
    FSDP has gathered codes, and there is nothing else."""
    parts = [part for part in weight.parts if type(part) is Tensor or type(part) is Parameter]
    count = _num_blocks(parts[0].shape[2]) if parts else 0
    for place, part in enumerate(parts):
        total = part.shape[0] * -(-part.shape[1] // BLOCK)
        numbers = range(place, count, len(parts))
        yield part, [min(int((number + phase) / count * total), total - 1) for number in numbers]
