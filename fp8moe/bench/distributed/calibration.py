"""What a run of `bench --distributed` says of one shape, as a plan for more GPUs needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression
from typing import Any

from fp8moe.bench.distributed.traffic import expected_distinct
from fp8moe.bench.distributed.ways import BF16_DISPATCH, CAPACITY, FP8_DISPATCH, PLAIN
from fp8moe.bench.distributed.wire import BF16_GATHER, BF16_ROWS, FP8_GATHER, FP8_ROWS, PLAIN_ROWS
from fp8moe.bench.shapes import Balance, Shape, layer_shape
from fp8moe.distributed import Dispatch
from fp8moe.gemm.cost import H200, SHIPPED, Cost, Costs, OpSizes

WAYS: dict[Dispatch | None, str] = {None: PLAIN, Dispatch.BF16: BF16_DISPATCH, Dispatch.FP8: FP8_DISPATCH}
"""Whose times stand for a dispatch; None is the plain layer."""
VISIT_PS = 3.0
"""Picoseconds that each feature of a token takes the device for each rank that it visits. Its message is packed and
read, its sum written and read again, and so are their gradients: some 12 bytes, at the copy rate of an H200."""


@dataclass(frozen=True)
class MeasuredStep:
    """Forward and backward of one layer."""

    both_ms: float
    """As launched by the host."""
    local_ms: float
    """What arrives being there already: of `ep_moe_forward` what the device takes, if a graph told. A graph needs a
    capacity, whose messages go to every rank: what the empty ones take is not in it."""
    wire_ms: float | None
    """What the exchanges take alone; None if that was not measured."""


def shape_of(problem: Mapping[str, Any]) -> Shape:
    """That of one problem in the JSON of a run."""
    sizes = problem["shape"]
    t, k, h, i, e = (sizes[letter] for letter in "tkhie")
    return layer_shape(t, k, h, i, e, sizes["name"])


def visits_ms(shape: Shape, visits: float) -> float:
    """What the device takes for the messages and sums of so many ranks that each token visits."""
    return VISIT_PS / 1e9 * shape["T"] * shape["H"] * visits


def measured_steps(problem: Mapping[str, Any]) -> dict[Dispatch | None, MeasuredStep]:
    """Those of one problem in the JSON of a run."""
    ways = {way["name"]: way for way in filter(None, (problem["bf16"], *problem["variants"])) if "both" in way}
    graphs = [ways.get(CAPACITY, {}).get(name) for name in ("graph", "graph_without_wire")]
    # Where the host is slower than the device, only a graph tells what the device takes. One with the wire takes no
    # less than one without.
    empty_ms = visits_ms(shape_of(problem), len(problem["rows_of_ranks"]) - problem["tokens_sent"])
    on_device = [graph["median_ms"] - empty_ms for graph in graphs if graph]
    found = {}
    for dispatch, name in WAYS.items():
        if name in ways and (without := ways[name]["without_wire"]):
            times = [without["median_ms"], *(on_device if dispatch else [])]
            found[dispatch] = MeasuredStep(ways[name]["both"]["median_ms"], min(times), ways[name]["wire_ms"])
    return found


@dataclass(frozen=True)
class Line:
    """How long an exchange of rows takes: a time of its own, and its bytes at a rate, whatever they hold."""

    fixed_ms: float
    gb_s: float
    """1e9 bytes a second that leave a rank."""

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """Fitted to bytes that leave a rank and the milliseconds that they took, by least squares. Where such a line
        would begin before 0 or fall, as it may where little travels, no exchange has a time of its own.

        Raises:
            ValueError: nothing left a rank.
        """
        sizes, times = [num_bytes / 1e6 for num_bytes, _ in points], [ms for _, ms in points]
        if len(set(sizes)) < 2:
            raise ValueError("nothing travelled: measure on two ranks or more")
        slope, fixed_ms = linear_regression(sizes, times)
        if fixed_ms < 0 or slope <= 0:
            slope, fixed_ms = linear_regression(sizes, times, proportional=True)
        return cls(fixed_ms, 1 / slope)


@dataclass(frozen=True)
class Calibration:
    """The measured rates of one shape. Whether a rate is of FP8 is the key of those that there are two of."""

    shape: Shape
    """Of the layer that is planned: `T` tokens a GPU, `E` experts of all."""
    measured_ranks: int
    measured_experts: int
    """How many each of them had."""
    costs: Costs
    """Of a layer on one GPU of that kind, by sizes."""
    steps: Mapping[Dispatch | None, MeasuredStep]
    rows: Line
    """Of an exchange."""
    gather_gb_s: Mapping[bool, float]
    """1e9 bytes a second that leave a rank in the gather of a weight."""
    host_ms: float
    """What launching forward and backward takes; 0 if that was not measured."""

    @classmethod
    def of(cls, document: Mapping[str, Any], problem: Mapping[str, Any]) -> "Calibration":
        """From the JSON of a run, and one of its problems.

        Raises:
            ValueError: the run left out the layers or the wire, or had one rank.
        """
        shape, steps = shape_of(problem), measured_steps(problem)
        wire = {each["name"]: each for each in problem["wire"]}
        if Dispatch.FP8 not in steps or not wire:
            raise ValueError(f"the run has no figures of {FP8_DISPATCH!r} or none of the wire; measure both parts")
        rows = [wire[name] for name in (PLAIN_ROWS, BF16_ROWS, FP8_ROWS)]
        capacity: Mapping[str, Any] = next((way for way in problem["variants"] if way["name"] == CAPACITY), {})
        return cls(
            shape=shape,
            measured_ranks=document["ranks"],
            measured_experts=shape["E"] // document["ranks"],
            costs=SHIPPED.get(document["environment"]["device"], SHIPPED[H200]).layer,
            steps=steps,
            rows=Line.through([(each["sent_bytes"], each["timing"]["median_ms"]) for each in rows]),
            gather_gb_s={False: wire[BF16_GATHER]["gb_s"], True: wire[FP8_GATHER]["gb_s"]},
            host_ms=(capacity.get("host_us") or 0.0) / 1e3,
        )

    @classmethod
    def all_of(cls, document: Mapping[str, Any]) -> "list[Calibration]":
        """From each problem with uniform routing in the JSON of a run: a plan assumes that.

        Raises:
            ValueError: there is none, or see `of`.
        """
        uniform = [problem for problem in document["problems"] if problem["routing"] == Balance.UNIFORM.value]
        if not uniform:
            raise ValueError("the run has no layer with uniform routing; measure with --routing uniform")
        return [cls.of(document, problem) for problem in uniform]

    def as_measured(self) -> "Calibration":
        """Of the layer that was measured."""
        return self.with_experts(self.measured_ranks * self.measured_experts)

    def with_experts(self, count: int) -> "Calibration":
        """The same rates for a layer of so many experts."""
        t, k, h, i, _ = self.shape.sizes
        return replace(self, shape=layer_shape(t, k, h, i, count, self.shape.name.split(",")[0]))

    def local_ms(self, dispatch: Dispatch | None, num_experts: int, visited: float) -> float:
        """Forward and backward on a rank with so many experts, without the wire: as much longer or shorter than
        measured as one GPU's layer of those sizes is predicted to be, and `VISIT_PS` for each rank that a token visits
        (in the plain layer its choices travel one by one, wherever they go). BF16 dispatch, if it was not measured, is
        like FP8's."""
        t, k, _, _, _ = self.shape.sizes
        cost, in_fp8 = (self.costs.bf16, False) if dispatch is None else (self.costs.fp8, True)
        then, now = (self._ms(cost, in_fp8, t, count) for count in (self.measured_experts, num_experts))
        local_ms = self.steps.get(dispatch, self.steps[Dispatch.FP8]).local_ms + now - then
        if dispatch is None:
            return local_ms
        ranks = self.measured_ranks
        visits = visited - expected_distinct(ranks, ranks * self.measured_experts, k)
        return local_ms + visits_ms(self.shape, visits)

    def unsharded_ms(self, in_fp8: bool, gathered_in_fp8: bool, tokens: int) -> float:
        """Forward and backward of the layer with all experts on one GPU, by the cost model alone. Weights that are
        gathered in FP8 need no quantization."""
        fp8 = self.costs.fp8_cached if gathered_in_fp8 else self.costs.fp8
        return self._ms(fp8 if in_fp8 else self.costs.bf16, in_fp8, tokens, self.shape["E"])

    def _ms(self, cost: Cost, in_fp8: bool, tokens: int, num_experts: int) -> float:
        _, k, h, i, _ = self.shape.sizes
        sizes = OpSizes.of_layer(tokens * k, h, i, num_experts)
        return cost.predict_device_us(sizes.padded if in_fp8 else sizes.exact) / 1e3
