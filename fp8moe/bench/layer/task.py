"""One layer to measure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fp8moe.bench import peers
from fp8moe.bench.kernels import Kernel
from fp8moe.bench.layer.baseline import bf16_layer
from fp8moe.bench.layer.kernels import layer_kernels
from fp8moe.bench.layer.problem import LayerProblem
from fp8moe.bench.layer.shapes import LayerShape, TopkRouting
from fp8moe.bench.layer.variants import LIGER_VARIANT, layer_variants
from fp8moe.bench.problem import Products
from fp8moe.bench.task import Task, What
from fp8moe.bench.variants import Explain, Variant
from fp8moe.config import KernelPreference


@dataclass(frozen=True)
class LayerTask(Task[LayerProblem]):
    """`fp8moe.moe_forward` behind such a router."""

    WHAT = What.LAYER

    shape: LayerShape
    routing: TopkRouting

    @classmethod
    def each(cls, shapes: Iterable[LayerShape], routings: Sequence[TopkRouting]) -> list["LayerTask"]:
        """Each shape with each routing."""
        return [cls(shape, routing) for shape in shapes for routing in routings]

    def problem(self, dtype: torch.dtype, device: torch.device, seed: int) -> LayerProblem:
        return LayerProblem.random(self.shape, self.routing, dtype, device, seed)

    def baseline(self, device: torch.device) -> Variant:
        return bf16_layer(device)

    def variants(self, explains: Iterable[Explain]) -> list[Variant]:
        liger = [LIGER_VARIANT] if peers.liger_is_installed() else []
        return [*liger, *(variant for explain in explains for variant in layer_variants(explain))]

    def kernels(
        self, problem: LayerProblem, expected: Products, preferences: Iterable[KernelPreference]
    ) -> list[Kernel]:
        return layer_kernels(problem, preferences)
