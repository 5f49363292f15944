"""How long forward and backward take, in BF16 and in FP8, predicted from sizes alone.

A prediction is linear in what a GPU has to do: launch kernels, pass over activations, pass over weights, multiply. But
it is never less than the time that the host needs to launch it all, which does not depend on the sizes. The
coefficients are measured (`python -m fp8moe tune`) for each kind of GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from fp8moe.operands import in_whole_blocks


class OpSize(NamedTuple):
    """The size of an op: what its forward and backward have to do besides launching kernels."""

    activations: int
    """Elements of what goes into the products and comes out of them."""
    weights: int
    """Elements of the weights of all experts."""
    multiply_adds: int
    """Of one of the three GEMMs."""

    @classmethod
    def of_product(cls, m: int, n: int, k: int, num_experts: int) -> "OpSize":
        """Of one `grouped_mm`: `(M, K)` and `(E, N, K)` to `(M, N)`."""
        return cls(m * (n + k), num_experts * n * k, m * n * k)

    @classmethod
    def of_layer(cls, m: int, h: int, i: int, num_experts: int) -> "OpSize":
        """Of both products of SwiGLU experts: `(M, H)` to `(M, 2I)`, and `(M, I)` back to `(M, H)`."""
        gate_up, down = cls.of_product(m, 2 * i, h, num_experts), cls.of_product(m, h, i, num_experts)
        return cls(
            gate_up.activations + down.activations,
            gate_up.weights + down.weights,
            gate_up.multiply_adds + down.multiply_adds,
        )


class OpSizes(NamedTuple):
    """What an op has to do in BF16 and in FP8, whose operands have features in whole blocks of 128."""

    exact: OpSize
    """In BF16."""
    padded: OpSize
    """In FP8."""
    features: tuple[tuple[int, int], ...]
    """`N` and `K` of each weight."""

    @classmethod
    def of_product(cls, m: int, n: int, k: int, num_experts: int) -> "OpSizes":
        """As `OpSize.of_product`."""
        padded = OpSize.of_product(m, in_whole_blocks(n), in_whole_blocks(k), num_experts)
        return cls(OpSize.of_product(m, n, k, num_experts), padded, ((n, k),))

    @classmethod
    def of_layer(cls, m: int, h: int, i: int, num_experts: int) -> "OpSizes":
        """As `OpSize.of_layer`."""
        padded = OpSize.of_layer(m, in_whole_blocks(h), in_whole_blocks(i), num_experts)
        return cls(OpSize.of_layer(m, h, i, num_experts), padded, ((2 * i, h), (h, i)))


def device_microseconds(coefficients: Sequence[float], size: OpSize) -> float:
    """The time that the device takes, from `Cost.coefficients`."""
    launch, activation, weight, multiply_add, _ = coefficients
    return launch + activation * size.activations + weight * size.weights + multiply_add * size.multiply_adds


@dataclass(frozen=True)
class Cost:
    """Microseconds of forward and backward: a constant, and what each element and multiply-add of an `OpSize` adds.

    Raises:
        ValueError: a coefficient is negative or not a finite number.
    """

    launch: float
    activation: float
    weight: float
    multiply_add: float
    host: float = 0.0
    """What the host needs to launch all of it, of any size, in a loop that runs ahead of the device."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name} is {value!r}; it must be a number of microseconds, at least 0")

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        """All fields, in their order."""
        return self.launch, self.activation, self.weight, self.multiply_add, self.host

    def predict_us(self, size: OpSize) -> float:
        """How long it takes in eager code, in microseconds: the host and the device work at the same time."""
        return max(self.host, self.predict_device_us(size))

    def predict_device_us(self, size: OpSize) -> float:
        """How long the device takes, as in a CUDA graph."""
        return device_microseconds(self.coefficients, size)


@dataclass(frozen=True)
class Costs:
    """The costs of an op, for each way to compute it."""

    bf16: Cost
    fp8: Cost
    """Weights are quantized in forward and again in backward."""
    fp8_cached: Cost
    """A `WeightCache` of each weight is fresh, as in every microbatch of a step but the first."""

    def fp8_with(self, cached: bool, kept: bool = False) -> Cost:
        """Of FP8, with the weights cached, or kept from forward to backward, or neither."""
        if cached or not kept:
            return self.fp8_cached if cached else self.fp8
        # Of the 6 bytes an element that both quantizations move, and a cache saves, keeping saves the second read: 2.
        quantizing = max(self.fp8.weight - self.fp8_cached.weight, 0.0)
        return replace(self.fp8, weight=self.fp8.weight - quantizing / 3)


@dataclass(frozen=True)
class CostModel:
    """The costs on one kind of GPU."""

    device: str
    """Its name, as `torch.cuda.get_device_name` gives it."""
    measured: str
    """When and how, for a reader."""
    product: Costs
    """Of `grouped_mm`, by `OpSize.of_product`."""
    layer: Costs
    """Of `swiglu_experts` and `moe_forward`, by `OpSize.of_layer`."""

    def costs(self, layer: bool) -> Costs:
        """Of the whole layer, or of one product."""
        return self.layer if layer else self.product


H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"

SHIPPED = {
    model.device: model
    for model in (
        # What `python -m fp8moe tune` prints, as it is. Measured with tiles of 128 tokens in wgrad, the default then.
        CostModel(
            device="NVIDIA H200",
            measured="2026-11-26, torch 2.11.0+cu130, triton 3.6.0: 108 products, 12 layers",
            product=Costs(
                bf16=Cost(43.07, 1.071e-06, 1.693e-06, 7.012e-09, host=426.7),
                fp8=Cost(42.77, 1.673e-06, 2.497e-06, 4.325e-09, host=1082.0),
                fp8_cached=Cost(45.25, 1.759e-06, 1.165e-06, 4.072e-09, host=1181.0),
            ),
            layer=Costs(
                bf16=Cost(78.0, 1.635e-06, 1.759e-06, 7.814e-09, host=984.5),
                fp8=Cost(88.08, 1.963e-06, 2.496e-06, 4.919e-09, host=2093.0),
                fp8_cached=Cost(94.97, 1.876e-06, 1.222e-06, 4.772e-09, host=2191.0),
            ),
        ),
        CostModel(
            device="NVIDIA H100 80GB HBM3",
            measured="2026-11-26, torch 2.11.0+cu130, triton 3.6.0: 108 products, 12 layers",
            product=Costs(
                bf16=Cost(44.43, 1.371e-06, 1.907e-06, 6.437e-09, host=579.1),
                fp8=Cost(38.4, 2.282e-06, 3.407e-06, 3.896e-09, host=1358.0),
                fp8_cached=Cost(43.95, 2.333e-06, 1.505e-06, 3.608e-09, host=1430.0),
            ),
            layer=Costs(
                bf16=Cost(77.21, 2.402e-06, 2.023e-06, 6.989e-09, host=1034.0),
                fp8=Cost(86.36, 2.339e-06, 3.37e-06, 4.655e-09, host=2638.0),
                fp8_cached=Cost(95.87, 2.378e-06, 1.553e-06, 4.344e-09, host=3008.0),
            ),
        ),
    )
}
"""By the name of the device."""
