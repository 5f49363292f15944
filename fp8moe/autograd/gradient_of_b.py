"""Within a product's backward: the gradient of `b`, in the layout of `b`, or added to its `main_grad`."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fp8moe.autograd.main_grad import is_wanted, nothing_for

Side = TypeVar("Side")


def needs_db(ctx: Any) -> bool:
    """Whether this backward makes the gradient of `b`, the second input."""
    return ctx.needs_input_grad[1] and (ctx.main_grad is None or is_wanted(ctx, 1))


def a_is_on_the_right(b_is_contiguous: bool, main_grad: Tensor | None) -> bool:
    """Whether the gradient is made as `(E, N, K)`: what `a` is the right side of.

    A product is contiguous in the order of its sides, and `(E, N, K)` or `(E, K, N)` may be the layout of `b` or of
    `main_grad`: the sides are swapped accordingly, and nothing needs a copy.
    """
    return not (b_is_contiguous if main_grad is None else main_grad.is_contiguous())


def gradient_of_b(
    a: Side, dout: Side, b_is_contiguous: bool, main_grad: Tensor | None,
    product: Callable[[Side, Side], Tensor], add: Callable[[Side, Side, Tensor], None],
) -> Tensor | None:  # fmt: skip
    """The gradient `(E, K, N)` of `b`, or None after adding it to `main_grad`."""
    on_the_right = a_is_on_the_right(b_is_contiguous, main_grad)
    if main_grad is None:
        return product(dout, a).transpose(1, 2) if on_the_right else product(a, dout)
    if on_the_right:
        add(dout, a, main_grad.transpose(1, 2))
    else:
        add(a, dout, main_grad)
    return None


def or_nothing(ctx: Any, db: Tensor | None) -> Tensor | None:
    """`db`, or what is returned for `b` where the gradient went to its `main_grad`."""
    return db if ctx.main_grad is None else nothing_for(ctx, 1, ctx.main_grad, ctx.b_dtype)
