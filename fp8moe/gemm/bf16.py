"""The grouped GEMMs in BF16, which AUTO takes where FP8 cannot run or would be slower.

PyTorch's `grouped_mm` takes matrices whose rows start at multiples of 16 bytes. Those of any other number of features
are copied to memory where their rows do: it knows no other way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.rows.unused_rows import zero_unused_rows_
from fp8moe.torch_op import returns_nothing, torch_op

ROW_ALIGNMENT = 8
"""Elements: 16 bytes."""


def are_taken_as_they_are(a: Tensor, b: Tensor) -> bool:
    """Whether PyTorch's `grouped_mm` multiplies `a` `(M, K)` and `b` `(E, K, N)`, and computes both gradients from
    contiguous ones, without a copy, to contiguous results."""
    _, k, n = b.shape
    return (
        a.dtype is b.dtype is torch.bfloat16
        and a.shape[0] != 0
        and k % ROW_ALIGNMENT == n % ROW_ALIGNMENT == 0
        and a.stride() == (k, 1)
        and b.stride() in ((k * n, n, 1), (k * n, 1, k))
        and _starts_aligned(a)
        and _starts_aligned(b)
        and not torch.is_autocast_enabled(a.device.type)  # which might convert them
    )


def is_taken_as_it_is(rows: Tensor) -> bool:
    """Whether PyTorch's `grouped_mm` takes these BF16 rows, of a multiple of 8 features."""
    return rows.stride() == (rows.shape[1], 1) and _starts_aligned(rows)


def _starts_aligned(x: Tensor) -> bool:
    """Whether `x` starts at a multiple of 16 bytes, which slices of flat buffers may not."""
    return x.data_ptr() % 16 == 0


def _empty_m_grouped(
    lhs: Tensor, rhs: Tensor, ends: Tensor, out_dtype: torch.dtype, zero_unused: bool = True
) -> Tensor:
    return lhs.new_empty((lhs.shape[0], rhs.shape[2]), dtype=out_dtype)


@torch_op(fake=_empty_m_grouped)
def m_grouped_bf16(
    lhs: Tensor, rhs: Tensor, ends: Tensor, out_dtype: torch.dtype, zero_unused: bool = True
) -> Tensor:  # fmt: skip
    """Forward and dgrad on ragged rows: `lhs` `(M, K)` times `rhs` `(E, K, N)`.

    Args:
        lhs, rhs: any float dtype, any strides; converted to BF16.
        ends: int32 `(E,)`, of `ends_within`.
        out_dtype: of the result.
        zero_unused: whether rows from `ends[-1]` on are zeros, or unspecified.

    Returns:
        `(M, N)` in `out_dtype`.
    """
    if lhs.shape[0] == 0:
        return _empty_m_grouped(lhs, rhs, ends, out_dtype)
    products = _products(_bf16(lhs), _bf16_matrices(rhs), ends).contiguous()
    if zero_unused:
        zero_unused_rows_(products, ends)
    return _converted(products, out_dtype)


def _empty_k_grouped(lhs: Tensor, rhs: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    return lhs.new_empty((ends.shape[0], lhs.shape[1], rhs.shape[1]), dtype=out_dtype)


@torch_op(fake=_empty_k_grouped)
def k_grouped_bf16(lhs: Tensor, rhs: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Wgrad: `lhs` `(M, N)` and `rhs` `(M, K)` contracted over each group's rows.

    Returns:
        `(E, N, K)` in `out_dtype`; exactly zero for a group without rows.
    """
    if lhs.shape[0] == 0:
        return _empty_k_grouped(lhs, rhs, ends, out_dtype).zero_()
    return _converted(_products(_bf16(lhs).t(), _bf16(rhs), ends).contiguous(), out_dtype)


@torch_op(fake=returns_nothing, mutates_args=("into",))
def k_grouped_add_bf16(lhs: Tensor, rhs: Tensor, ends: Tensor, into: Tensor) -> None:
    """Add the products of `k_grouped_bf16`, each rounded to BF16, to `into` `(E, N, K)` in place."""
    if lhs.shape[0] > 0:
        into.add_(_products(_bf16(lhs).t(), _bf16(rhs), ends))


def _products(lhs: Tensor, rhs: Tensor, ends: Tensor) -> Tensor:
    """In BF16 under any autocast. Entering a context costs as much host time as a launch: only if needed."""
    device_type = lhs.device.type
    if not torch.is_autocast_enabled(device_type):
        return F.grouped_mm(lhs, rhs, offs=ends)
    with torch.autocast(device_type, enabled=False):
        return F.grouped_mm(lhs, rhs, offs=ends)


def _bf16(x: Tensor) -> Tensor:
    """BF16, row-major: `grouped_mm` refuses expanded gradients and rows that do not start at multiples of 16 bytes."""
    x, width = x.bfloat16(), x.shape[-1]
    # Even if contiguous, a single row of a view may have any stride.
    if x.is_contiguous() and x.stride(-2) % ROW_ALIGNMENT == 0 and _starts_aligned(x):
        return x
    aligned_width = -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return x.new_empty((*x.shape[:-1], aligned_width)).narrow(-1, 0, width).copy_(x)


def _bf16_matrices(x: Tensor) -> Tensor:
    """BF16, each matrix row-major or column-major as it is; else row-major."""
    if x.is_contiguous() or not x.transpose(1, 2).is_contiguous():
        return _bf16(x)
    return _bf16(x.transpose(1, 2)).transpose(1, 2)


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)
