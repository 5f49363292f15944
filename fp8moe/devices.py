"""Questions about devices, in one place."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor compute capability of an NVIDIA GPU that torch can use; None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@cache
def device_name(device: torch.device) -> str:
    """What the driver calls a CUDA device, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on this device."""
    return compute_capability(device) is not None and importlib.util.find_spec("triton") is not None


@cache
def runs_triton_fp8(device: torch.device) -> bool:
    """Whether Triton kernels that convert to e4m3 run on this device: compute capability 8.9 or newer."""
    return runs_triton(device) and (compute_capability(device) or (0, 0)) >= (8, 9)


@cache
def runs_hopper_kernels(device: torch.device) -> bool:
    """Whether Gluon kernels whose layouts are made for Hopper run on this device: compute capability 9.0."""
    return runs_triton(device) and compute_capability(device) == (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_being_captured(x: Tensor) -> bool:
    """Whether what is done with `x` now becomes part of a CUDA graph, and does not run."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_capturing() -> bool:
    """Whether a CUDA graph is made of what is launched now. It never starts CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, for libraries that launch on the current device."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
