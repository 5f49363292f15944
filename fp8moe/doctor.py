"""`python -m fp8moe doctor`: what is installed, what runs on each device and why, and whether it computes correctly."""

import importlib.metadata
import platform

import torch
import torch.nn.functional as F

from fp8moe import __version__
from fp8moe.autograd.grouped_mm import grouped_mm
from fp8moe.config import FP8Config, KernelPreference
from fp8moe.gemm.explain import explain

PACKAGES = ("torch", "triton", "sgl-deep-gemm", "apache-tvm-ffi")
MIN_SQNR_DB = 27.0


def run() -> int:
    """Print the report; 0 if every device can be used and every usable backend computes correctly, else 1."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    print(f"fp8moe {__version__}")
    for package in PACKAGES:
        print(f"{package} {_version(package)}")
    print(f"CUDA of torch: {torch.version.cuda or 'none'}; GPUs: {torch.cuda.device_count()}")
    healthy = True
    for device in _devices():
        try:
            explanation = explain(device)
        except ValueError as error:
            print(f"\nfp8moe on {device} cannot run: {error}")
            healthy = False
            continue
        print(f"\n{explanation}\nself-check, against fp32 (at least {MIN_SQNR_DB:.0f} dB)")
        for preference in (preference for preference, lacks in explanation.lacks.items() if not lacks):
            decibels = self_check(device, preference)
            passed = decibels >= MIN_SQNR_DB
            healthy &= passed
            print(f"  {preference.name:<9}{decibels:.1f} dB: {'ok' if passed else 'WRONG'}")
    return 0 if healthy else 1


def self_check(device: torch.device, preference: KernelPreference) -> float:
    """SQNR in dB of a small ragged `grouped_mm` against fp32 on the CPU: the lowest of output and gradients."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 256, generator=generator)
    w = torch.randn(4, 384, 256, generator=generator)
    dout = torch.randn(300, 384, generator=generator)
    offs = torch.tensor([100, 100, 229, 300], dtype=torch.int32)

    def results(device: torch.device, dtype: torch.dtype, fp8: bool) -> list[torch.Tensor]:
        a_, w_ = (x.to(device, dtype, copy=True).requires_grad_() for x in (a, w))
        b, offs_ = w_.transpose(-2, -1), offs.to(device)
        config = FP8Config(kernel_preference=preference, debug=True)
        out = grouped_mm(a_, b, offs_, config=config) if fp8 else F.grouped_mm(a_, b, offs=offs_)
        out.backward(dout.to(device, dtype))
        return [x.detach().float().cpu() for x in (out, a_.grad, w_.grad) if x is not None]

    expected = results(torch.device("cpu"), torch.float32, fp8=False)
    actual = results(device, torch.bfloat16, fp8=True)
    ratios = [(y.square().sum() / (x - y).square().sum()).log10() * 10 for x, y in zip(actual, expected, strict=True)]
    return float(torch.stack(ratios).min())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
