"""How fast a kernel could be: the bytes and flops that it cannot do without, over the device's measured rates.

Bytes count each input once and each output once; flops those of the rows the caller has, padding apart. An operand has
the bytes of its groups padded to multiples of 128 rows (the rows in use, not the capacity).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.bench.timing import Budget, Region, Stopwatch, measure
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenOperand, WeightOperand
from fp8moe.rows.routing import Routing

FP8_CAPABILITY = (8, 9)
"""The first NVIDIA GPUs whose tensor cores take FP8."""
CEILINGS_BUDGET = Budget(milliseconds=200)

Moved = Tensor | RowOperand | TokenOperand | WeightOperand | LongTiles | TokenGroups | Routing
"""What a kernel reads or writes."""


@dataclass(frozen=True)
class Ceilings:
    """The rates of the device, measured in the same run as everything else."""

    copy_gb_s: float
    """A large device-to-device copy, bytes read and written, 1e9 a second."""
    bf16_tflop_s: float
    """A large BF16 matrix product, 1e12 a second."""
    fp8_tflop_s: float | None
    """A large FP8 product with one scale a tensor; None where there are no FP8 tensor cores."""

    def floor_ms(self, num_bytes: float, flops: int, in_bf16: bool) -> float | None:
        """Milliseconds below which a kernel cannot come; None if the rate of its flops is unknown."""
        moving = num_bytes / self.copy_gb_s / 1e6
        if not flops:
            return moving
        rate = self.bf16_tflop_s if in_bf16 else self.fp8_tflop_s
        return None if rate is None else max(moving, flops / rate / 1e9)


def moved_bytes(moved: Iterable[Moved], group_sizes: Sequence[int]) -> int:
    """Bytes of all of `moved`, of operands the rows in use by groups of these sizes."""
    in_use = rows_in_use(group_sizes) / TokenGroups.capacity_for(sum(group_sizes), len(group_sizes))
    total = 0.0
    for each in moved:
        share = in_use if isinstance(each, RowOperand | TokenOperand | LongTiles) else 1
        total += share * sum(tensor.nbytes for tensor in _tensors(each))
    return round(total)


def rows_in_use(group_sizes: Sequence[int]) -> int:
    """Rows of groups of these sizes, each padded to a multiple of 128."""
    return sum(-(-size // BLOCK) * BLOCK for size in group_sizes)


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


def _tensors(moved: Moved) -> Iterable[Tensor]:
    if isinstance(moved, Tensor):
        return [moved]
    if isinstance(moved, WeightOperand):
        return moved.data, moved.scale
    return [moved.amax] if isinstance(moved, LongTiles) else moved.tensors


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
