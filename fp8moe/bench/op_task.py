"""One grouped product to measure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fp8moe.bench import peers
from fp8moe.bench.kernels import Kernel, kernels
from fp8moe.bench.op_problem import OpProblem
from fp8moe.bench.problem import Products
from fp8moe.bench.shapes import Routing, Shape, group_sizes
from fp8moe.bench.task import Task, What
from fp8moe.bench.variants import BF16, Explain, Variant, fp8moe_variants, torchao_variant
from fp8moe.config import KernelPreference


@dataclass(frozen=True)
class OpTask(Task[OpProblem]):
    """`fp8moe.grouped_mm` on groups of these sizes."""

    WHAT = What.OP

    shape: Shape
    routing: Routing
    group_sizes: list[int]

    @classmethod
    def each(cls, shapes: Iterable[Shape], routings: Sequence[Routing], seed: int) -> list["OpTask"]:
        """Each shape with each routing.

        Raises:
            ValueError: a shape does not fit a routing.
        """
        return [cls(shape, routing, group_sizes(shape, routing, seed)) for shape in shapes for routing in routings]

    def problem(self, dtype: torch.dtype, device: torch.device, seed: int) -> OpProblem:
        return OpProblem.random(self.shape, self.routing, self.group_sizes, dtype, device, seed)

    def baseline(self, device: torch.device) -> Variant:
        return BF16

    def variants(self, explains: Iterable[Explain]) -> list[Variant]:
        torchao = [torchao_variant(self.routing)] if peers.torchao_is_installed() else []
        return [*torchao, *(variant for explain in explains for variant in fp8moe_variants(explain))]

    def kernels(self, problem: OpProblem, expected: Products, preferences: Iterable[KernelPreference]) -> list[Kernel]:
        return kernels(problem, expected, preferences)
