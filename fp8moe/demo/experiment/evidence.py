"""Which kernels a step ran: the proof that the experts of an FP8 run are FP8, and those of a BF16 run BF16."""

import re
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_Result = TypeVar("_Result")

_FP8_GEMM = re.compile(r"(m_grouped|wgrad)_kernel|deep_gemm|fp8moe::emulated")
_BF16_GEMM = "aten::_grouped_mm"
_KEPT = 100


class Evidence(TypedDict):
    """What was seen of one step."""

    fp8_gemms: int
    """Launches of FP8 kernels for the experts' products. A layer has six: two products, and two gradients of each."""
    bf16_gemms: int
    """Calls of PyTorch's grouped product, but for those of the emulation of FP8."""
    kernels: dict[str, list[float]]
    """By name, of all that ran on the device (without one, of all operators): how often, and microseconds in all. The
    hundred that took longest."""


def observe(step: Callable[[], _Result]) -> tuple[_Result, Evidence]:
    """What `step` returns, and which kernels it ran."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # without, torch 2.11 warns of later cycles
        result = step()
        if on_gpu:
            torch.cuda.synchronize()
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = profiler.key_averages()
    kernels = {
        event.key: [event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total]
        for event in events
        if event.device_type == where
    }
    longest = sorted(kernels.items(), key=lambda item: item[1][1], reverse=True)[:_KEPT]
    return result, {
        "fp8_gemms": int(sum(count for name, (count, _) in kernels.items() if _FP8_GEMM.search(name))),
        "bf16_gemms": sum(event.name == _BF16_GEMM and not _is_emulated(event) for event in profiler.events()),
        "kernels": dict(longest),
    }


def _is_emulated(event: Any) -> bool:
    """Whether an operator was called by one of fp8moe's, whose emulation multiplies in fp32."""
    while event is not None:
        if event.name.startswith("fp8moe::"):
            return True
        event = event.cpu_parent
    return False
