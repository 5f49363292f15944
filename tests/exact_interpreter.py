"""Triton's interpreter, mended so that a kernel can be held to a reference bit for bit on a CPU.

The stock interpreter (Triton 3.6 to 3.9) rounds conversions to e4m3 and bf16 wrongly; PyTorch's casts round as the
hardware does. It rounds a fused multiply-add twice; the hardware rounds once. Reductions by a function of one's own
take it a call an element; here they take a call a halving. That of Triton 3.6 takes no argument as the bound of a loop
under NumPy 2.4; that of Triton 3.9 takes no mask that a scalar took part in. Arithmetic in bf16 or e4m3 stays wrong
(the interpreter holds them as integers): kernels convert to fp32 right after every load.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_TORCH_DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_E4M3_NAN_BITS = 0x7F
_E4M3_MAX = 448.0


def _bits_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(f"uint{dtype.itemsize * 8}")


def convert_float(values: npt.NDArray[Any], source: Any, target: Any, rounding_mode: object) -> npt.NDArray[Any]:
    """Convert between Triton float types as an sm_90 GPU does: round to nearest even; e4m3 saturates and has one NaN.

    `values` holds the source's values or their bits; the result holds the target's bits.
    """
    from triton._C.libtriton import ir

    if rounding_mode == ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("the exact interpreter rounds to nearest even only")
    source_dtype, target_dtype = _TORCH_DTYPES[source.name], _TORCH_DTYPES[target.name]
    bits = np.array(values, copy=True).reshape(-1).view(_bits_dtype(source_dtype))
    x = torch.from_numpy(bits).view(source_dtype)
    if target_dtype is torch.float8_e4m3fn:
        codes = x.float().clamp(-_E4M3_MAX, _E4M3_MAX).to(target_dtype).view(torch.uint8)
        result = torch.where(x.isnan(), _E4M3_NAN_BITS, codes).numpy()
    else:
        result = x.to(target_dtype).view(getattr(torch, _bits_dtype(target_dtype).name)).numpy()
    return result.reshape(values.shape)


def fused_multiply_add(x: npt.NDArray[Any], y: npt.NDArray[Any], z: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`x * y + z` of fp32 arrays, rounded once. In fp64 the product is exact; the sum is rounded to odd there, which a
    second rounding to fp32 cannot tell from the exact sum (Boldo and Melquiond, 2008)."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum: total + error is exact
    bits = total.view(np.int64)
    away_from_zero = (error > 0) == (total > 0)
    to_odd = np.where((error != 0) & (bits % 2 == 0), np.where(away_from_zero, 1, -1), 0)
    return np.asarray((bits + to_odd).view(np.float64).astype(np.float32))


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    if x.data.dtype != np.float32:
        raise NotImplementedError(f"the exact interpreter fuses fp32 alone, not {x.data.dtype}")
    return TensorHandle(fused_multiply_add(x.data, y.data, z.data), z.dtype.scalar)


def reduce_by_halves(self: Any, operands: tuple[Any]) -> list[Any]:
    """`tl.reduce` of one tensor along one axis, a power of two long: log2 calls of the combine function on tensors,
    where the stock interpreter makes one call an element. The function must be associative, as Triton demands."""
    if len(operands) != 1 or self.axis is None:
        raise NotImplementedError("the exact interpreter reduces one tensor along one axis")
    (operand,) = operands
    data = np.moveaxis(operand.handle.data, self.axis, 0)
    while len(data) > 1:
        halves = (self.to_tensor(np.ascontiguousarray(half), operand.dtype) for half in np.split(data, 2))
        data = self.combine_fn.fn(*halves).handle.data
    result = data if self.keep_dims else data[0]
    return [self.to_tensor(np.moveaxis(result, 0, self.axis) if self.keep_dims else result, operand.dtype)]


def _with_boolean_mask(stock: Callable[..., Any], position: int) -> Callable[..., Any]:
    """A load or store whose mask, the argument at `position`, is made boolean first."""

    def access(self: Any, *args: Any) -> Any:
        mask = args[position]
        mask.data = mask.data.astype(bool)
        return stock(self, *args)

    return access


def _patch_tensor(tensor: Any, scope: Any, stock: Callable[[Any, Any], None]) -> None:
    stock(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def install() -> None:
    """Mend the interpreter of this process (`TRITON_INTERPRET=1` must have been set before Triton was imported)."""
    from triton.runtime import interpreter

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_fma = _create_fma
    interpreter.ReduceOps.generic_reduce = reduce_by_halves
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _with_boolean_mask(builder.create_masked_load, position=1)
    builder.create_masked_store = _with_boolean_mask(builder.create_masked_store, position=2)
    interpreter._patch_lang_tensor = partial(_patch_tensor, stock=interpreter._patch_lang_tensor)
