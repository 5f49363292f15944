"""How fast it could be: the bytes and flops that a kernel cannot do without, over the device's measured rates.

Bytes count each input once and each output once; flops those of the rows the caller has, padding apart. An operand has
the bytes of its groups padded to multiples of 128 rows (the rows in use, not the capacity).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8moe.bench.timing import Budget, Region, Stopwatch, measure
from fp8moe.operands import BLOCK, TokenGroups

Precision = Literal["fp8", "bf16"]

SCALE_BYTES = 4
INDEX_BYTES = 4
BF16_BYTES = 2
FP8_CAPABILITY = (8, 9)
"""The first NVIDIA GPUs whose tensor cores take FP8."""
CEILINGS_BUDGET = Budget(milliseconds=200)


@dataclass(frozen=True)
class KernelWork:
    """The least that one kernel has to do."""

    bytes: int
    flops: int = 0
    precision: Precision = "fp8"
    """Of the tensor cores that do the flops."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one problem, by their features."""

    m: int
    """Rows, all of them in groups."""
    padded: int
    """Rows in use once every group is padded to a multiple of 128."""
    capacity: int
    """Rows of the padded layout, some of which nothing uses."""
    e: int
    itemsize: int
    """Bytes of an element of the high-precision tensors."""

    @classmethod
    def of(cls, group_sizes: Sequence[int], dtype: torch.dtype) -> "Sizes":
        """Of groups of these rows."""
        m, e = sum(group_sizes), len(group_sizes)
        padded = sum(-(-size // BLOCK) * BLOCK for size in group_sizes)
        return cls(m, padded, TokenGroups.capacity_for(m, e), e, dtype.itemsize)

    def rows(self, features: int) -> int:
        """A high-precision `(M, features)`."""
        return self.m * features * self.itemsize

    def bf16_rows(self, features: int) -> int:
        """A BF16 `(M, features)`."""
        return self.m * features * BF16_BYTES

    def operand(self, features: int) -> int:
        """A row or token operand: one code an element, one scale for 128 of them."""
        return self.padded * features + self.padded * features // BLOCK * SCALE_BYTES

    def weight(self, n: int, k: int) -> int:
        """The high-precision `(E, N, K)`, or its gradient."""
        return self.e * n * k * self.itemsize

    def weight_operands(self, n: int, k: int, count: int = 1) -> int:
        """The codes of one weight operand or both, and one set of scales."""
        return self.e * (count * n * k + (n // BLOCK) * (k // BLOCK) * SCALE_BYTES)


@dataclass(frozen=True)
class Ceilings:
    """The rates of the device, measured in the same run as everything else."""

    copy_gb_s: float
    """A large device-to-device copy, bytes read and written, 1e9 a second."""
    bf16_tflop_s: float
    """A large BF16 matrix product, 1e12 a second."""
    fp8_tflop_s: float | None
    """A large FP8 product with one scale a tensor; None where there are no FP8 tensor cores."""

    def floor_ms(self, works: Iterable[KernelWork]) -> float | None:
        """Milliseconds below which these kernels, one after the other, cannot come; None if a rate is unknown."""
        seconds = 0.0
        for work in works:
            moving = work.bytes / (self.copy_gb_s * 1e9)
            if not work.flops:
                seconds += moving
                continue
            rate = self.fp8_tflop_s if work.precision == "fp8" else self.bf16_tflop_s
            if rate is None:
                return None
            seconds += max(moving, work.flops / (rate * 1e12))
        return seconds * 1e3


def measure_ceilings(device: torch.device, stopwatch: Stopwatch) -> Ceilings:
    """Copy and multiply random data, on a GPU enough of it to fill the chip."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    has_fp8 = on_gpu and torch.version.cuda and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return Ceilings(
        copy_gb_s=_copy_gb_s(torch.randn(2**29 if on_gpu else 2**22, device=device), stopwatch),
        bf16_tflop_s=_matrix_tflop_s(lambda: a @ b.t(), size, stopwatch),
        fp8_tflop_s=_matrix_tflop_s(_fp8_product(a, b), size, stopwatch) if has_fp8 else None,
    )


def _copy_gb_s(source: Tensor, stopwatch: Stopwatch) -> float:
    target = torch.empty_like(source)
    milliseconds = measure(lambda: target.copy_(source), stopwatch, CEILINGS_BUDGET).median_ms
    return (source.nbytes + target.nbytes) / milliseconds / 1e6


def _matrix_tflop_s(product: Region, size: int, stopwatch: Stopwatch) -> float:
    return 2 * size**3 / measure(product, stopwatch, CEILINGS_BUDGET).median_ms / 1e9


def _fp8_product(a: Tensor, b: Tensor) -> Region:
    """`a @ b.t()` in FP8 with one scale for each tensor and fast accumulation: the most that cuBLAS gives."""
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
