"""Who watches: the layer that computes now, and what looks at its calls.

Whoever watches says, around the forward of a layer, that it is this layer's turn (`entered`). What computes asks
`observation_of` once a call, and hands the answer on. Where nobody watches that is one look at an empty list.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.autograd.expert_mlp import Observation
from fp8moe.devices import is_capturing


class Watched(Protocol):
    """A layer that somebody watches."""

    def layer(self) -> Observation | None:
        """Of the call of a layer that begins; None if this call is not to be seen."""

    def product(self) -> Observation | None:
        """Likewise of a single product."""


class _Entered(threading.local):
    """By thread: backward runs in others, and checkpointing runs forward there."""

    def __init__(self) -> None:
        self.layers: list[Watched] = []


_entered = _Entered()


def enter(layer: Watched) -> None:
    """What this thread computes from now on is of `layer`, until `leave`."""
    _entered.layers.append(layer)


def leave() -> None:
    """What this thread computes from now on is of the layer that was entered before."""
    if _entered.layers:
        _entered.layers.pop()


@contextmanager
def entered(layer: Watched) -> Iterator[None]:
    """`enter` and `leave`."""
    enter(layer)
    try:
        yield
    finally:
        leave()


def observation_of(x: Tensor, *, is_product: bool = False) -> Observation | None:
    """What looks at the call that begins, of a layer or of a product, whose input is `x`.

    None if nobody watches, and in compiled code, in CUDA graphs and where tensors hold no data: what is done there now
    says nothing of what will run.
    """
    if torch.compiler.is_compiling() or not _entered.layers:
        return None
    if type(x) is not Tensor and type(x) is not Parameter:
        return None
    if x.is_meta or is_capturing():
        return None
    layer = _entered.layers[-1]
    return layer.product() if is_product else layer.layer()
