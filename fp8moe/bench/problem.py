"""The tensors of one shape and routing, and the three products that every variant must get right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fp8moe.bench.shapes import Routing, Shape

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A differentiable grouped product: `a` `(M, K)`, `w` `(E, N, K)` and `offs` `(E,)` to `(M, N)`."""


class Products(NamedTuple):
    """What forward, dgrad and wgrad compute."""

    out: Tensor
    """`(M, N)`."""
    da: Tensor
    """`(M, K)`."""
    dw: Tensor
    """`(E, N, K)`."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Random operands, the same for all variants."""

    shape: Shape
    routing: Routing
    group_sizes: list[int]
    a: Tensor
    """`(M, K)`, needs a gradient."""
    w: Tensor
    """`(E, N, K)`, needs a gradient."""
    offs: Tensor
    """int32 `(E,)`."""
    dout: Tensor
    """`(M, N)`, the gradient of the product's output."""

    @classmethod
    def random(
        cls,
        shape: Shape,
        routing: Routing,
        group_sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> "Problem":
        """Standard normal activations and gradients, weights that keep the outputs of that size."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=dtype, device=device)

        return cls(
            shape,
            routing,
            list(group_sizes),
            a=normal(shape.m, shape.k).requires_grad_(),
            w=normal(shape.e, shape.n, shape.k).mul_(shape.k**-0.5).requires_grad_(),
            offs=torch.tensor(group_sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
            dout=normal(shape.m, shape.n),
        )

    @cached_property
    def main_grad(self) -> Tensor:
        """fp32 `(E, N, K)`, zeros at first: for an op that adds `dw` to `w.main_grad`, as Megatron names it."""
        main_grad = torch.zeros_like(self.w, dtype=torch.float32)
        self.w.main_grad = main_grad  # type: ignore[attr-defined]
        return main_grad

    def forward(self, op: Op) -> Tensor:
        """`(M, N)`, ready to be differentiated."""
        return op(self.a, self.w, self.offs)

    def backward(self, out: Tensor, keep_graph: bool = False) -> tuple[Tensor, Tensor]:
        """`(da, dw)`; with `keep_graph` it can be called again. Of an op that returns no `dw`, `main_grad`."""
        da, dw = torch.autograd.grad(out, (self.a, self.w), self.dout, retain_graph=keep_graph, allow_unused=True)
        return da, self.main_grad if dw is None else dw

    def products(self, op: Op) -> Products:
        """A training step's worth: forward and backward."""
        out = self.forward(op)
        return Products(out.detach(), *self.backward(out))
