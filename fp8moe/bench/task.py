"""What is measured: the description of an operation of `fp8moe`, and of everything that is measured on it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fp8moe.bench.floor import Work
from fp8moe.bench.kernels import Kernel
from fp8moe.bench.problem import Op, Problem, Products
from fp8moe.bench.shapes import Balance, Shape, parse_shape
from fp8moe.bench.variants import Option, Run, Variant
from fp8moe.config import KernelPreference
from fp8moe.gemm.cost import OpSize


@dataclass(frozen=True)
class Task:
    """One of two: `product.task.PRODUCT` and `layer.task.LAYER`."""

    name: str
    """In the JSON."""
    title: str
    explained_as: Literal["shape", "layer"]
    """The argument of `fp8moe.explain` that takes the sizes."""
    shape: Callable[..., Shape]
    """A shape of these sizes and, perhaps, this name."""
    shapes_on_cuda: tuple[Shape, ...]
    shapes_on_cpu: tuple[Shape, ...]
    balances: tuple[Balance, ...]
    """The default first."""
    problem: Callable[[Shape, Balance, torch.device, int], Problem]
    """The tensors, with values from the seed that comes last."""
    reference: Callable[[Shape], Op]
    """In BF16, without a compiler: what every check refers to."""
    eager: Callable[[Shape], Op]
    """In BF16, as users write it."""
    baselines: Callable[[Shape, torch.device], list[Variant]]
    """PyTorch's ways in BF16, `eager` first: every ratio refers to the fastest."""
    peer_package: str
    peer: Callable[[Shape, list[int]], Variant | None]
    """Another project's, for groups of these rows; None if it has no such op."""
    run: Callable[[Shape], Run]
    options: Callable[[Shape], Sequence[Option]]
    """With each of which it is measured where it computes in FP8."""
    kernels: Callable[[Shape, Problem, Products, set[KernelPreference]], Iterable[Kernel]]
    """What is measured by itself, with the backends of these preferences; the products are the baseline's."""
    step: Callable[[Shape, Sequence[int]], list[Work]]
    """The fewest FP8 kernels of forward and backward, for groups of these rows."""
    op_size: Callable[[Shape], OpSize]
    """By which AUTO decides between FP8 and BF16."""

    def parse(self, text: str) -> Shape:
        """Read the sizes, such as `M,N,K,E`; a shape that is known comes with its name.

        Raises:
            ValueError: `text` is not as many fitting integers.
        """
        return parse_shape(text, (*self.shapes_on_cuda, *self.shapes_on_cpu), self.shape)
