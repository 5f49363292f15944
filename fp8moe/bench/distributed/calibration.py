"""What a run of `bench --distributed` says of one shape, as a plan for more GPUs needs it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fp8moe.bench.distributed.ways import BF16_DISPATCH, CAPACITY, FP8_DISPATCH, PLAIN
from fp8moe.bench.distributed.wire import BF16_GATHER, BF16_ROWS, FP8_GATHER, FP8_ROWS
from fp8moe.bench.shapes import Shape, layer_shape
from fp8moe.distributed import Dispatch
from fp8moe.gemm.cost import H200, SHIPPED, Cost, Costs, OpSizes

WAYS: dict[Dispatch | None, str] = {None: PLAIN, Dispatch.BF16: BF16_DISPATCH, Dispatch.FP8: FP8_DISPATCH}
"""Whose times stand for a dispatch; None is the plain layer."""


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
    both_ms: Mapping[Dispatch | None, float]
    """Of forward and backward, as measured."""
    without_wire_ms: Mapping[Dispatch | None, float]
    """Likewise, with what arrives there already."""
    rows_gb_s: Mapping[bool, float]
    """1e9 bytes a second that leave a rank in an exchange of messages."""
    gather_gb_s: Mapping[bool, float]
    """Likewise, in the gather of a weight."""
    host_ms: float
    """What launching forward and backward takes; 0 if that was not measured."""

    @classmethod
    def of(cls, document: Mapping[str, Any], problem: Mapping[str, Any]) -> "Calibration":
        """From the JSON of a run, and one of its problems.

        Raises:
            ValueError: the run left out the layers or the wire.
        """
        sizes = problem["shape"]
        t, k, h, i, e = (sizes[letter] for letter in "tkhie")
        shape = layer_shape(t, k, h, i, e, sizes["name"])
        ways = {way["name"]: way for way in filter(None, (problem["bf16"], *problem["variants"])) if "both" in way}
        wire = {each["name"]: each["gb_s"] for each in problem["wire"]}
        without = {
            dispatch: ways[name]["without_wire"]["median_ms"]
            for dispatch, name in WAYS.items()
            if name in ways and ways[name]["without_wire"]
        }
        if graph := ways.get(CAPACITY, {}).get("graph_without_wire"):
            # Where the host is slower than the device, only a graph tells what the device takes.
            without |= {dispatch: min(without[dispatch], graph["median_ms"]) for dispatch in without if dispatch}
        if Dispatch.FP8 not in without or not wire:
            raise ValueError(f"the run has no figures of {FP8_DISPATCH!r} or none of the wire; measure both parts")
        return cls(
            shape=shape,
            measured_ranks=document["ranks"],
            measured_experts=shape["E"] // document["ranks"],
            costs=SHIPPED.get(document["environment"]["device"], SHIPPED[H200]).layer,
            both_ms={dispatch: ways[WAYS[dispatch]]["both"]["median_ms"] for dispatch in without},
            without_wire_ms=without,
            rows_gb_s={False: wire[BF16_ROWS], True: wire[FP8_ROWS]},
            gather_gb_s={False: wire[BF16_GATHER], True: wire[FP8_GATHER]},
            host_ms=(ways.get(CAPACITY, {}).get("host_us") or 0.0) / 1e3,
        )

    def as_measured(self) -> "Calibration":
        """Of the layer that was measured."""
        return self.with_experts(self.measured_ranks * self.measured_experts)

    def with_experts(self, count: int) -> "Calibration":
        """The same rates for a layer of so many experts."""
        t, k, h, i, _ = self.shape.sizes
        return replace(self, shape=layer_shape(t, k, h, i, count, self.shape.name.split(",")[0]))

    def local_ms(self, dispatch: Dispatch | None, num_experts: int) -> float:
        """Forward and backward on a rank with so many experts, without the wire: as much longer or shorter than
        measured as one GPU's layer of those sizes is predicted to be. BF16 dispatch, if it was not measured, is like
        FP8's."""
        measured = self.without_wire_ms.get(dispatch, self.without_wire_ms[Dispatch.FP8])
        cost, in_fp8 = (self.costs.bf16, False) if dispatch is None else (self.costs.fp8, True)
        t = self.shape["T"]
        return measured * self._ms(cost, in_fp8, t, num_experts) / self._ms(cost, in_fp8, t, self.measured_experts)

    def unsharded_ms(self, in_fp8: bool, gathered_in_fp8: bool, tokens: int) -> float:
        """Forward and backward of the layer with all experts on one GPU, by the cost model alone. Weights that are
        gathered in FP8 need no quantization."""
        fp8 = self.costs.fp8_cached if gathered_in_fp8 else self.costs.fp8
        return self._ms(fp8 if in_fp8 else self.costs.bf16, in_fp8, tokens, self.shape["E"])

    def _ms(self, cost: Cost, in_fp8: bool, tokens: int, num_experts: int) -> float:
        _, k, h, i, _ = self.shape.sizes
        sizes = OpSizes.of_layer(tokens * k, h, i, num_experts)
        return cost.predict_device_us(sizes.padded if in_fp8 else sizes.exact) / 1e3
