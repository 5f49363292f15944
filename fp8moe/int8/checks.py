"""Checks that the functions of `fp8moe.int8` share. Each message names the argument, the value and the fix."""

from enum import Enum

import torch
from torch import Tensor

from fp8moe.checks import check_device, check_float, check_same_device, check_tensors


class Rounding(Enum):
    """How a value in the middle between two codes is rounded."""

    HALF_TO_EVEN = "half to even"
    """To the even code: IEEE 754's, and the one without bias."""
    HALF_AWAY_FROM_ZERO = "half away from zero"
    """To the larger magnitude: as C's `round`."""


def check_rounding(rounding: object) -> bool:
    """Whether it is away from zero."""
    if not isinstance(rounding, Rounding):
        raise TypeError(f"rounding is {rounding!r}; it must be a fp8moe.int8.Rounding")
    return rounding is Rounding.HALF_AWAY_FROM_ZERO


def check_matrix(x: object, name: str) -> None:
    """Rows of floats on a device that runs."""
    check_tensors({name: x})
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(getattr(x, 'shape', ()))}; it must be (rows, features)")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have features")
    check_float(x, name)
    check_device(x, name)


def check_size(value: object, name: str) -> None:
    """A positive number of elements."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive int")


def check_vector(x: object, name: str, size: int, dtype: torch.dtype | None, like: Tensor, like_name: str) -> None:
    """`(size,)`, of this dtype, on the device of another tensor."""
    check_tensors({name: x})
    if not isinstance(x, Tensor) or x.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(getattr(x, 'shape', ()))}; it must be ({size},)")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {dtype}: pass {name}.to({dtype})")
    check_same_device(x, name, like, like_name)


def check_no_gradient(**tensors: Tensor | None) -> None:
    """Nothing here has a gradient; to return a tensor without one would hide that."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient, and fp8moe.int8 has none: call it in torch.no_grad()")
