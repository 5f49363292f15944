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
        """fp32, zeros at first, for an op that adds the gradient of a weight to its `main_grad`, as Megatron has it."""
        main_grads = {}
        for name, tensor in self.inputs.items():
            if tensor.dim() == 3:
                main_grads[name] = torch.zeros_like(tensor, dtype=torch.float32)
                tensor.main_grad = main_grads[name]  # type: ignore[attr-defined]
        return main_grads

    def compared(self, products: Products) -> Products:
        """The products in rows each of which must be right by itself."""
        return {
            name: product.flatten(self.compared_from.get(name, product.dim() - 1)) for name, product in products.items()
        }

    def forward(self, op: Op) -> Tensor:
        """The output, ready to be differentiated."""
        return op(*self.arguments.values())

    def backward(self, out: Tensor, keep_graph: bool = False) -> Products:
        """The gradients; with `keep_graph` it can be called again. Of a weight that gets none or a sparse zero, its
        `main_grad`.

        Raises:
            WrongResultError: another input gets none.
        """
        inputs = list(self.inputs.values())
        gradients = torch.autograd.grad(out, inputs, self.d_out, retain_graph=keep_graph, allow_unused=True)
        return {
            name: self._main_grad(name) if gradient is None or gradient.is_sparse else gradient
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


def random_normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """A function that draws standard normal BF16 tensors of the sizes it is given, another one each time."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.bfloat16, device=device)

    return normal
