"""The tensors of one grouped product."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fp8moe.bench.floor import Precision, Sizes, Work, backward_work, forward_work
from fp8moe.bench.problem import Problem, random_normal
from fp8moe.bench.shapes import Routing, Shape


@dataclass(frozen=True, eq=False)
class OpProblem(Problem):
    """For ops of `a` `(M, K)`, `w` `(E, N, K)` and `offs` `(E,)` to `(M, N)`; its products are `out`, `da` and `dw`."""

    shape: Shape
    a: Tensor
    """`(M, K)`, needs a gradient."""
    w: Tensor
    """`(E, N, K)`, needs a gradient."""
    offs: Tensor
    """int32 `(E,)`."""
    dout: Tensor
    """`(M, N)`."""

    @classmethod
    def random(
        cls,
        shape: Shape,
        routing: Routing,
        group_sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> "OpProblem":
        """Standard normal activations and gradients, weights that keep the outputs of that size."""
        normal = random_normal(dtype, device, seed)
        return cls(
            shape,
            routing,
            list(group_sizes),
            a=normal(shape.m, shape.k).requires_grad_(),
            w=normal(shape.e, shape.n, shape.k).mul_(shape.k**-0.5).requires_grad_(),
            offs=torch.tensor(group_sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
            dout=normal(shape.m, shape.n),
        )

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.a, self.w, self.offs

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"da": self.a, "dw": self.w}

    @property
    def d_out(self) -> Tensor:
        return self.dout

    @cached_property
    def sizes(self) -> Sizes:
        """What the work of every kernel follows from."""
        return Sizes.of(self.shape, self.group_sizes, self.a.dtype)

    def forward_work(self, precision: Precision) -> list[Work]:
        return forward_work(self.sizes, precision)

    def backward_work(self, precision: Precision) -> list[Work]:
        return backward_work(self.sizes, precision)
