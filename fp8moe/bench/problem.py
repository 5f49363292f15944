"""The tensors that every variant computes on, and the products that it must get right."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from fp8moe.bench.floor import Precision, Work
from fp8moe.bench.guard import OUT, WrongResultError
from fp8moe.bench.shapes import AnyShape

Op = Callable[..., Tensor]
"""A differentiable function of `Problem.arguments`."""
Products = dict[str, Tensor]
"""What a training step computes: `out`, and each gradient by its name."""


@dataclass(frozen=True, eq=False)
class Problem(ABC):
    """Random tensors, the same for all variants."""

    shape: AnyShape
    routing: Enum
    group_sizes: list[int]
    """Rows of each expert."""

    @property
    @abstractmethod
    def arguments(self) -> tuple[Tensor, ...]:
        """What an op takes, in its order."""

    @property
    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """What needs a gradient, by the name of the gradient."""

    @property
    @abstractmethod
    def d_out(self) -> Tensor:
        """The gradient of an op's output."""

    @abstractmethod
    def forward_work(self, precision: Precision) -> list[Work]:
        """The fewest kernels of a training forward."""

    @abstractmethod
    def backward_work(self, precision: Precision) -> list[Work]:
        """The fewest kernels of a backward."""

    def compared(self, products: Products) -> Products:
        """The products in the rows (last dimension) of which each must be right by itself."""
        return products

    @cached_property
    def main_grads(self) -> Products:
        """fp32, zeros at first, for an op that adds the gradient of a weight to its `main_grad`, as Megatron names it.

        The weights are the inputs of three dimensions.
        """
        main_grads = {}
        for name, weight in self.inputs.items():
            if weight.dim() == 3:
                main_grads[name] = torch.zeros_like(weight, dtype=torch.float32)
                weight.main_grad = main_grads[name]  # type: ignore[attr-defined]
        return main_grads

    def forward(self, op: Op) -> Tensor:
        """The output, ready to be differentiated."""
        return op(*self.arguments)

    def backward(self, out: Tensor, keep_graph: bool = False) -> Products:
        """The gradients; with `keep_graph` it can be called again. Of a weight that gets none, its `main_grad`.

        Raises:
            WrongResultError: another input gets none.
        """
        inputs = list(self.inputs.values())
        gradients = torch.autograd.grad(out, inputs, self.d_out, retain_graph=keep_graph, allow_unused=True)
        return {
            name: self._main_grad(name) if gradient is None else gradient
            for name, gradient in zip(self.inputs, gradients, strict=True)
        }

    def products(self, op: Op) -> Products:
        """A training step's worth: forward and backward."""
        out = self.forward(op)
        return {OUT: out.detach(), **self.backward(out)}

    def _main_grad(self, name: str) -> Tensor:
        if name not in self.main_grads:
            raise WrongResultError(f"{name} is missing: the output does not depend on its input")
        return self.main_grads[name]


def random_normal(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    """A function that draws standard normal tensors of the sizes it is given, another one each time."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=dtype, device=device)

    return normal
