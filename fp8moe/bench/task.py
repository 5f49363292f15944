"""What is measured: a problem before its tensors exist, and everything that is measured on it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Generic, TypeVar

import torch

from fp8moe.bench.kernels import Kernel
from fp8moe.bench.problem import Problem, Products
from fp8moe.bench.shapes import AnyShape
from fp8moe.bench.variants import Explain, Variant
from fp8moe.config import KernelPreference

AProblem = TypeVar("AProblem", bound=Problem)


class What(Enum):
    """What the problems of one run are."""

    OP = "op"
    """`fp8moe.grouped_mm`."""
    LAYER = "layer"
    """`fp8moe.moe_forward`."""

    @property
    def title(self) -> str:
        """For a reader."""
        return {What.OP: "Grouped matrix product", What.LAYER: "MoE layer"}[self]


@dataclass(frozen=True)
class Task(ABC, Generic[AProblem]):
    """One problem to measure."""

    WHAT: ClassVar[What]

    shape: AnyShape
    routing: Enum

    @abstractmethod
    def problem(self, dtype: torch.dtype, device: torch.device, seed: int) -> AProblem:
        """Its tensors, with values from `seed`."""

    @abstractmethod
    def baseline(self, device: torch.device) -> Variant:
        """BF16: what every ratio and check refers to."""

    @abstractmethod
    def variants(self, explains: Iterable[Explain]) -> list[Variant]:
        """All others: peers that are installed, and `fp8moe` with each configuration to explain, for this shape."""

    @abstractmethod
    def kernels(self, problem: AProblem, expected: Products, preferences: Iterable[KernelPreference]) -> list[Kernel]:
        """What is measured by itself, with the backends of `preferences`; `expected` is the baseline's."""
