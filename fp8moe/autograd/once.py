"""Backward that can run, but not be differentiated."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def differentiable_once(operation: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Make a second derivative through the decorated `Function.backward` an error that names `operation`.

    `torch.autograd.function.once_differentiable` raises only where the incoming gradient itself needs one, and else
    drops the second derivative silently: a gradient penalty would train on nothing.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor) -> Gradients:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            return without_gradient(operation, gradients)

        return wrapper

    return decorate


def without_gradient(operation: str, gradients: Gradients) -> Gradients:
    """The same gradients, with an error that names `operation` where they are differentiated."""
    message = f"{operation} can be differentiated once: its backward has no gradient of its own"
    raise_later = torch._C._functions.DelayedError(message.encode(), len(gradients))
    leaves: list[Any] = [g if g is None else g.detach().requires_grad_() for g in gradients]
    return tuple(raise_later(*leaves))
