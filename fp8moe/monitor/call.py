"""What a monitor sees of one call of a layer: it implements `Observation`, and keeps small tensors on the device."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.autograd.expert_mlp import Experts, Plan
from fp8moe.autograd.weights import ExpertWeight
from fp8moe.config import ScaleFormat
from fp8moe.monitor import statistics
from fp8moe.operands import BLOCK, RowOperand, TokenGroups
from fp8moe.quantize import swiglu_reference

NUM_BLOCKS = 4
"""Blocks of 128 rows in a sample, and bands of 128 rows of a weight."""

Check = Callable[[str, Tensor], None]
"""Takes the name of a result, and the elements that will tell whether it is finite."""


@dataclass
class Seen:
    """Of one layer in one step that is sampled."""

    step: int
    phase: float
    """From 0 to 1: where the sample lies."""
    operands: dict[str, Tensor] = field(default_factory=dict)
    """fp32 `(5,)` each, `statistics.NAMES`, of the first call in the step."""
    tokens: Tensor | None = None
    """int64 `(E,)`: rows of each expert, of all calls in the step."""
    begun: set[str] = field(default_factory=set)
    """The prefixes of the calls that have begun."""


class Call:
    """One call.

    Args:
        prefix: of the names of all operands.
        check: called with every result.
        seen: of the step, if it is sampled.
        counts: whether forward is to be seen: not where checkpointing computes it once more.
    """

    def __init__(self, prefix: str, check: Check, seen: Seen | None, counts: bool) -> None:
        self._prefix, self._check, self._seen, self._counts = prefix, check, seen, counts
        self._samples = seen is not None and (prefix not in seen.begun or not counts)
        if seen is not None:
            seen.begun.add(prefix)

    def operand(
        self, name: str, x: Tensor, groups: TokenGroups | None, scale_format: ScaleFormat, *, rows: bool, tokens: bool
    ) -> None:  # fmt: skip
        """See `Observation`; so for all methods."""
        seen = self._sampled(is_forward=not name.startswith("d_"))
        if seen is None or not x.shape[0]:
            return
        with torch.no_grad():
            if groups is None:
                at_most = NUM_BLOCKS * BLOCK
                sample = x[statistics.rows_of(x.shape[0], seen.phase, at_most, x.device)].float()
            else:
                if not groups.capacity:
                    return
                sample = statistics.taken(x, _Rows(groups, seen.phase).source)
            self._measure(name, sample, sample, scale_format, rows=rows, tokens=tokens and groups is not None)

    def weight(self, name: str, weight: ExpertWeight, scale_format: ScaleFormat) -> None:
        seen = self._sampled(is_forward=True)
        if seen is None:
            return
        parts = [part for part in weight.parts if type(part) is Tensor or type(part) is Parameter]
        if not parts:  # FSDP has gathered codes: there is nothing else
            return
        with torch.no_grad():
            bands = torch.stack([_band(parts[number % len(parts)], number, seen.phase) for number in range(NUM_BLOCKS)])
            self._keep(name, statistics.of_weight(bands, scale_format))

    def gate_up(self, gate_up: Tensor, experts: Experts, plan: Plan) -> None:
        self.routed(experts.groups.ends)
        self.weight("w_gate_up", experts.gate_up, plan.scale_format)
        self.weight("w_down", experts.down, plan.scale_format)
        seen = self._sampled(is_forward=True)
        if seen is None or not experts.groups.capacity:
            return
        with torch.no_grad():
            rows = _Rows(experts.groups, seen.phase)
            act = plan.act.with_bias(experts.bias)
            values = statistics.taken(gate_up, rows.source)
            sample = swiglu_reference.swiglu(values, rows.weights(experts), act, rows.groups)
            self._measure("activation", sample, sample, plan.scale_format, rows=True, tokens=plan.wanted.w_down)

    def d_activation(self, d_activation: Tensor, gate_up: Tensor | RowOperand, experts: Experts, plan: Plan) -> None:
        seen = self._sampled(is_forward=False)
        if seen is None or not experts.groups.capacity:
            return
        with torch.no_grad():
            rows = _Rows(experts.groups, seen.phase)
            act = plan.act.with_bias(experts.bias)
            if isinstance(gate_up, RowOperand):
                values = statistics.taken_from_operand(gate_up, rows.padded, rows.source < 0)
            else:
                values = statistics.taken(gate_up, rows.source)
            d_act = statistics.taken(d_activation, rows.source)
            sample, _ = swiglu_reference.swiglu_backward(d_act, values, rows.weights(experts), act, rows.groups)
            self._measure(
                "d_gate_up", swiglu_reference.padded(sample, act), sample, plan.scale_format,
                rows=plan.wanted.x, tokens=plan.wanted.w_gate_up,
            )  # fmt: skip

    def routed(self, ends: Tensor) -> None:
        if self._seen is None or not self._counts:
            return
        with torch.no_grad():
            counts = torch.diff(ends.long(), prepend=ends.new_zeros(1, dtype=torch.int64))
            if self._seen.tokens is None:
                self._seen.tokens = counts
            elif not self._prefix or self._prefix.startswith("product0"):
                self._seen.tokens += counts

    def result(self, name: str, x: Tensor, *, in_fp8: bool = True) -> None:
        if not self._counts and not name.startswith("d_"):
            return
        # Of what an FP8 product returns, one element of each 128 is enough: NaN in a row fills the row, and in a weight
        # all 128 columns of its block.
        with torch.no_grad():
            self._check(self._prefix + name, x[:, ::BLOCK] if in_fp8 else x)

    def _sampled(self, *, is_forward: bool) -> Seen | None:
        """Where to put what a sample gives, if this call is sampled there."""
        return self._seen if self._samples and (self._counts or not is_forward) else None

    def _measure(
        self, name: str, rows_of: Tensor, tokens_of: Tensor, scale_format: ScaleFormat, *, rows: bool, tokens: bool
    ) -> None:  # fmt: skip
        if rows:
            self._keep(f"{name}.rows", statistics.of_rows(rows_of, scale_format))
        if tokens:
            self._keep(f"{name}.tokens", statistics.of_tokens(tokens_of, scale_format))

    def _keep(self, name: str, measured: Tensor) -> None:
        if self._seen is not None:
            self._seen.operands[self._prefix + name] = measured


class _Rows:
    """The sampled rows of a layer."""

    def __init__(self, groups: TokenGroups, phase: float) -> None:
        self.padded = statistics.padded_rows_of(groups, phase, NUM_BLOCKS)
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


def _band(w: Tensor, number: int, phase: float) -> Tensor:
    """fp32 `(128, K)`: 128 rows of one expert's matrix of `w` `(E, N, K)`, in whole blocks; filled up with zeros."""
    num_experts, n, _ = w.shape
    bands = (n + BLOCK - 1) // BLOCK
    place = int((number + phase) / NUM_BLOCKS * num_experts * bands)
    expert, band = divmod(min(place, num_experts * bands - 1), bands)
    rows = w[expert, band * BLOCK : (band + 1) * BLOCK].float()
    return torch.nn.functional.pad(rows, (0, 0, 0, BLOCK - rows.shape[0]))
