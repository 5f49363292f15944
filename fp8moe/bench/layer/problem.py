"""The tensors of one MoE layer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fp8moe.bench.floor import Precision, Work
from fp8moe.bench.layer.floor import LayerSizes, backward_work, forward_work
from fp8moe.bench.layer.shapes import LayerShape, TopkRouting, draw_topk
from fp8moe.bench.problem import Problem, Products, random_normal


@dataclass(frozen=True, eq=False)
class LayerProblem(Problem):
    """For ops of `hidden`, `topk_ids`, `topk_weights`, `w_gate_up` and `w_down` to `(T, H)`, as `fp8moe.moe_forward`.

    Its products are `out` and the gradients of all but the ids, such as `d_hidden`.
    """

    shape: LayerShape
    hidden: Tensor
    """`(T, H)`, needs a gradient."""
    topk_ids: Tensor
    """int64 `(T, k)`."""
    topk_weights: Tensor
    """fp32 `(T, k)`, needs a gradient."""
    w_gate_up: Tensor
    """`(E, 2I, H)`, needs a gradient."""
    w_down: Tensor
    """`(E, H, I)`, needs a gradient."""
    dout: Tensor
    """`(T, H)`."""

    @classmethod
    def random(
        cls, shape: LayerShape, routing: TopkRouting, dtype: torch.dtype, device: torch.device, seed: int
    ) -> "LayerProblem":
        """Standard normal tokens and gradients, weights that keep what they make of that size, a random router."""
        normal = random_normal(dtype, device, seed)
        topk_ids, topk_weights = draw_topk(shape, routing, seed)
        return cls(
            shape,
            routing,
            torch.bincount(topk_ids.flatten(), minlength=shape.e).tolist(),
            hidden=normal(shape.t, shape.h).requires_grad_(),
            topk_ids=topk_ids.to(device),
            topk_weights=topk_weights.to(device).requires_grad_(),
            w_gate_up=normal(shape.e, 2 * shape.i, shape.h).mul_(shape.h**-0.5).requires_grad_(),
            w_down=normal(shape.e, shape.h, shape.i).mul_(shape.i**-0.5).requires_grad_(),
            dout=normal(shape.t, shape.h),
        )

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.hidden, self.topk_ids, self.topk_weights, self.w_gate_up, self.w_down

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {
            "d_hidden": self.hidden,
            "d_topk_weights": self.topk_weights,
            "d_w_gate_up": self.w_gate_up,
            "d_w_down": self.w_down,
        }

    @property
    def d_out(self) -> Tensor:
        return self.dout

    @cached_property
    def sizes(self) -> LayerSizes:
        """What the work of every kernel follows from."""
        return LayerSizes.of(self.shape, self.group_sizes, self.hidden.dtype)

    def forward_work(self, precision: Precision) -> list[Work]:
        return forward_work(self.sizes, precision)

    def backward_work(self, precision: Precision) -> list[Work]:
        return backward_work(self.sizes, precision)

    def compared(self, products: Products) -> Products:
        """By token, by expert, and the gradient of the router's weights as a whole.

        A row of an expert's weight gradient sums over its tokens, and a token has few weights: of a few numbers that
        happen to be small, the noise of correct FP8 may be as large.
        """
        return {
            **products,
            "d_topk_weights": products["d_topk_weights"].flatten(),
            "d_w_gate_up": products["d_w_gate_up"].flatten(1),
            "d_w_down": products["d_w_down"].flatten(1),
        }
