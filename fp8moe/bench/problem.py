"""The tensors that every variant computes on, and the products that it must get right."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fp8moe.bench.guard import OUT, WrongResultError

Op = Callable[..., Tensor]
"""A differentiable function of `Problem.arguments`."""
Products = dict[str, Tensor]
"""What a training step computes: `out`, and the gradient `d_x` of each argument `x` that needs one."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Random tensors, the same for all variants."""

    arguments: dict[str, Tensor]
    """What an op takes, in its order. The weights are those of three dimensions that need a gradient."""
    d_out: Tensor
    """The gradient of an op's output."""
    group_sizes: list[int]
    """Rows of each expert."""
    compared_from: Mapping[str, int] = field(default_factory=dict)
    """Of products that are not to be right in each row (last dimension) by itself: the first of the dimensions that are
    compared as one row."""

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What needs a gradient, by the name of the gradient."""
        return {f"d_{name}": tensor for name, tensor in self.arguments.items() if tensor.requires_grad}

    @cached_property
    def main_grads(self) -> Products:
        """fp32, zeros at first, for an op that adds the gradient of a weight to its `main_grad`, as Megatron has it.
        There are none before they are asked for."""
        main_grads = {}
        for name, tensor in self.inputs.items():
            if tensor.dim() == 3:
                main_grads[name] = torch.zeros_like(tensor, dtype=torch.float32)
                tensor.main_grad = main_grads[name]  # type: ignore[attr-defined]
        return main_grads

    def drop_main_grads(self) -> None:
        """Give back their memory, if there are any."""
        for name in self.__dict__.pop("main_grads", {}):
            del self.inputs[name].main_grad  # type: ignore[attr-defined]

    def compared(self, products: Products) -> Products:
        """The products in rows each of which must be right by itself."""
        return {
            name: product.flatten(self.compared_from.get(name, product.dim() - 1)) for name, product in products.items()
        }

    def forward(self, op: Op) -> Tensor:
        """The output, ready to be differentiated."""
        return op(*self.arguments.values())

    def backward(self, out: Tensor) -> Products:
        """The gradients. Of a weight that gets none or a sparse zero, its `main_grad`.

        Raises:
            WrongResultError: an input gets none, and has no `main_grad`.
        """
        inputs = list(self.inputs.values())
        gradients = torch.autograd.grad(out, inputs, self.d_out, allow_unused=True)
        return {
            name: self._main_grad(name) if gradient is None or gradient.is_sparse else gradient
            for name, gradient in zip(self.inputs, gradients, strict=True)
        }

    def products(self, op: Op) -> Products:
        """A training step's worth: forward and backward."""
        out = self.forward(op)
        return {OUT: out.detach(), **self.backward(out)}

    def _main_grad(self, name: str) -> Tensor:
        main_grad = self.__dict__.get("main_grads", {}).get(name)
        if main_grad is None:
            raise WrongResultError(f"{name} is missing: the output does not depend on its input")
        return main_grad


def random_normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """A function that draws standard normal BF16 tensors of the sizes it is given, another one each time."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.bfloat16, device=device)

    return normal
