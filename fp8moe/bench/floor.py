"""How fast it could be: the bytes and flops that a kernel cannot do without, over the device's measured rates.

Bytes count each input once and each output once; flops those of the rows the caller has, padding apart. An operand has
the bytes of its groups padded to multiples of 128 rows (the rows in use, not the capacity).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8moe.bench.shapes import Shape
from fp8moe.bench.timing import Budget, Region, Stopwatch, measure
from fp8moe.groups import TokenGroups
from fp8moe.operands import BLOCK

Precision = Literal["fp8", "bf16"]

SCALE_BYTES = 4
INDEX_BYTES = 4
BF16_BYTES = 2
FP8_CAPABILITY = (8, 9)
"""The first NVIDIA GPUs whose tensor cores take FP8."""
CEILINGS_BUDGET = Budget(milliseconds=200)


@dataclass(frozen=True)
class Work:
    """The least that one kernel has to do."""

    bytes: int
    flops: int = 0
    precision: Precision = "fp8"
    """Of the tensor cores that do the flops."""


@dataclass(frozen=True)
class Sizes:
    """What the work of every kernel of one problem follows from."""

    m: int
    """Rows, all of them in groups."""
    r: int
    """Rows in use once every group is padded to a multiple of 128."""
    capacity: int
    """Rows of the padded layout, of which `r` are in use."""
    n: int
    k: int
    e: int
    itemsize: int
    """Bytes of an element of the high-precision tensors."""

    @classmethod
    def of(cls, shape: Shape, group_sizes: Sequence[int], dtype: torch.dtype) -> "Sizes":
        """The sizes of `shape` with groups of these rows."""
        padded = sum(-(-size // BLOCK) * BLOCK for size in group_sizes)
        capacity = TokenGroups.capacity_for(shape.m, shape.e)
        return cls(shape.m, padded, capacity, shape.n, shape.k, shape.e, dtype.itemsize)

    def activation(self, features: int) -> int:
        """Bytes of a high-precision `(M, features)`."""
        return self.m * features * self.itemsize

    def operand(self, features: int) -> int:
        """Bytes of a row or token operand: one code an element, one scale for 128 of them."""
        return self.r * features + self.r * features // BLOCK * SCALE_BYTES

    @property
    def weight(self) -> int:
        """Bytes of the high-precision `(E, N, K)`, or its gradient."""
        return self.e * self.n * self.k * self.itemsize

    @property
    def weight_data(self) -> int:
        """Bytes of the codes of one weight operand."""
        return self.e * self.n * self.k

    @property
    def weight_scale(self) -> int:
        """Bytes of the scales of one weight operand."""
        return self.e * (self.n // BLOCK) * (self.k // BLOCK) * SCALE_BYTES

    @property
    def gemm_flops(self) -> int:
        """Of forward, dgrad or wgrad: a multiplication and an addition for each of M N K."""
        return 2 * self.m * self.n * self.k


def plan_groups(s: Sizes) -> Work:
    """`TokenGroups.from_offs`: `offs` in; out, two ends an expert, two numbers a padded row, one a row."""
    return Work(INDEX_BYTES * (s.e + 2 * s.e + 2 * s.capacity + s.m))


def quantize_activation(s: Sizes, features: int, operands: int) -> Work:
    """`(M, features)` to one operand (rows or tokens) or both."""
    return Work(s.activation(features) + operands * s.operand(features))


def quantize_weight(s: Sizes, operands: int) -> Work:
    """`(E, N, K)` to the codes for forward, for dgrad or for both, and one set of scales."""
    return Work(s.weight + operands * s.weight_data + s.weight_scale)


def requantize(s: Sizes, features: int) -> Work:
    """A row operand to a token operand."""
    return Work(2 * s.operand(features))


def unpad(s: Sizes, features: int) -> Work:
    """The rows of `(R, features)` that are somebody's to `(M, features)`."""
    return Work(2 * s.activation(features))


def forward_gemm(s: Sizes) -> Work:
    """`(R, K)` times `(E, N, K)` to `(M, N)`."""
    return Work(s.operand(s.k) + s.weight_data + s.weight_scale + s.activation(s.n), s.gemm_flops)


def dgrad_gemm(s: Sizes) -> Work:
    """`(R, N)` times `(E, K, N)` to `(M, K)`."""
    return Work(s.operand(s.n) + s.weight_data + s.weight_scale + s.activation(s.k), s.gemm_flops)


def wgrad_gemm(s: Sizes) -> Work:
    """`(N, R)` times `(K, R)` to `(E, N, K)`."""
    return Work(s.operand(s.n) + s.operand(s.k) + s.weight, s.gemm_flops)


def bf16_gemm(s: Sizes) -> Work:
    """Forward, dgrad or wgrad in BF16: each touches the same three tensors."""
    elements = s.m * s.k + s.m * s.n + s.e * s.n * s.k
    return Work(elements * BF16_BYTES, s.gemm_flops, "bf16")


def forward_work(s: Sizes, precision: Precision) -> list[Work]:
    """The fewest kernels of a training forward: in FP8, two quantizations (both operands of `a`) and a GEMM."""
    if precision == "bf16":
        return [bf16_gemm(s)]
    return [quantize_activation(s, s.k, operands=2), quantize_weight(s, operands=1), forward_gemm(s)]


def backward_work(s: Sizes, precision: Precision) -> list[Work]:
    """The fewest kernels of a backward: in FP8, two quantizations (both operands of `dout`) and two GEMMs."""
    if precision == "bf16":
        return [bf16_gemm(s), bf16_gemm(s)]
    return [quantize_activation(s, s.n, operands=2), quantize_weight(s, operands=1), dgrad_gemm(s), wgrad_gemm(s)]


@dataclass(frozen=True)
class Ceilings:
    """The rates of the device, measured in the same run as everything else."""

    copy_gb_s: float
    """A large device-to-device copy, bytes read and written, 1e9 a second."""
    bf16_tflop_s: float
    """A large BF16 matrix product, 1e12 a second."""
    fp8_tflop_s: float | None
    """A large FP8 product with one scale a tensor; None where there are no FP8 tensor cores."""

    def floor_ms(self, works: Iterable[Work]) -> float | None:
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
