"""Checks of the tensors that public functions take. Each message names the argument, the value and the fix."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE_TYPES = ("cpu", "cuda")


def are_ordinary(*tensors: object) -> bool:
    """Whether `check_tensors` and `check_device` find nothing in any of them, asked quickly. False may also mean that
    only they can tell, as in a trace."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        if type(x) is not Tensor and type(x) is not Parameter:
            return False
        if x.layout is not torch.strided or not (x.is_cuda or x.is_cpu):
            return False
    return True


def check_tensors(named: Mapping[str, object]) -> None:
    """Each must be a plain dense tensor, outside the transforms of `torch.func`."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
        if hasattr(value, "to_local"):  # without an import of torch.distributed.tensor
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a plain tensor: pass {name}.to_local()")
        if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise TypeError(
                f"{name} is within a transform of torch.func, such as vmap, which fp8moe does not support: call it "
                "outside, with all rows at once"
            )
        if value.layout is not torch.strided:
            raise ValueError(f"{name} has layout {value.layout}; it must be dense: pass {name}.to_dense()")


def check_float(x: Tensor, name: str, *, double: bool = False) -> None:
    """`x` must be of one of `FLOAT_DTYPES`; with `double` it may be float64 too."""
    dtypes = (*FLOAT_DTYPES, torch.float64) if double else FLOAT_DTYPES
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be one of {', '.join(map(str, dtypes))}")


def check_same_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """`x` must be where `other` is."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} and {other_name} on {other.device}; move them to the same device")


def check_device(x: Tensor, name: str) -> None:
    """`x` must be on one of `DEVICE_TYPES`."""
    if x.device.type not in DEVICE_TYPES:
        raise ValueError(f"{name} is on {x.device}; the device must be one of {', '.join(DEVICE_TYPES)}")
