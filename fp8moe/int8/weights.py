"""Weights to INT8 and INT4 with group scales, and how two INT4 codes share a byte."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.checks import check_device, check_float, check_tensors
from fp8moe.int8.checks import Rounding, check_no_gradient, check_rounding, check_size
from fp8moe.int8.reference import INT4_LEVELS, INT8_LEVELS
from fp8moe.int8.rows import int8_quantize_rows

LEVELS = {8: INT8_LEVELS, 4: INT4_LEVELS}
"""The largest code, for each number of bits."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight `(E, N, K)` in INT8 or INT4, with a scale for `group_size` elements of K of each row.

    The only copy: nothing unpacked is kept beside it, so that nothing can be stale when `data` is written in place.
    """

    data: Tensor
    """int8 `(E, N, K)`; or uint8 `(E, N / 2, K)`, as `pack_int4(dim=1)` makes it. Contiguous."""
    scale: Tensor
    """fp32 `(E, N, ceil(K / group_size))`, stored `(E, groups, N)`, as the kernel reads it."""
    group_size: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def codes(self) -> Tensor:
        """int8 `(E, N, K)`, unpacked from `data` as it is now."""
        return self.data if self.bits == 8 else unpack_int4(self.data, dim=1)

    def dequantized(self) -> Tensor:
        """fp32 `(E, N, K)`."""
        scale = self.scale.repeat_interleave(self.group_size, dim=2)[:, :, : self.data.shape[2]]
        return self.codes.float() * scale


def quantize_weight(
    w: Tensor,
    weight_bits: int,
    group_size: int | None = None,
    *,
    smooth: Tensor | None = None,
    rounding: Rounding = Rounding.HALF_TO_EVEN,
) -> QuantizedWeight:
    """Quantize a weight with group scales, one expert at a time.

    Args:
        w: bf16, fp16 or fp32 `(E, N, K)`, any strides.
        weight_bits: 8 or 4.
        group_size: elements of K that share a scale, the last group may be shorter; None: all of K.
        smooth: float `(E, K)`: what to multiply the columns of each expert by, before they are quantized.
        rounding: of what lies in the middle between two codes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device; or N is odd for 4 bits.
    """
    check_tensors({"w": w})
    if w.dim() != 3 or 0 in w.shape:
        raise ValueError(f"w has shape {tuple(w.shape)}; it must be (E, N, K), each at least 1")
    check_float(w, "w")
    check_device(w, "w")
    if weight_bits not in LEVELS:
        raise ValueError(f"weight_bits is {weight_bits!r}; it must be 8 or 4")
    num_experts, num_rows, num_features = w.shape
    if weight_bits == 4 and num_rows % 2:
        raise ValueError(f"w has shape {tuple(w.shape)}; N must be even for 4 bits: two rows share a byte")
    group_size = num_features if group_size is None else group_size
    check_size(group_size, "group_size")
    if smooth is not None:
        check_tensors({"smooth": smooth})
        if smooth.shape != (num_experts, num_features):
            raise ValueError(f"smooth has shape {tuple(smooth.shape)}; it must be {(num_experts, num_features)}")
    away = check_rounding(rounding)
    check_no_gradient(w=w, smooth=smooth)
    groups = -(-num_features // group_size)
    shape = (num_experts, num_rows, num_features) if weight_bits == 8 else (num_experts, num_rows // 2, num_features)
    data = torch.empty(shape, dtype=torch.int8 if weight_bits == 8 else torch.uint8, device=w.device)
    scale = torch.empty(num_experts, groups, num_rows, device=w.device)
    for expert in range(num_experts):
        rows = w[expert] if smooth is None else w[expert].float() * smooth[expert].float()
        codes, scales = int8_quantize_rows(rows, group_size, LEVELS[weight_bits], away)
        data[expert] = codes if weight_bits == 8 else pack_int4(codes, dim=0)
        scale[expert] = scales.t()
    return QuantizedWeight(data, scale.transpose(1, 2), group_size)


def pack_int4(codes: Tensor, dim: int) -> Tensor:
    """Put two codes into each byte.

    Along the last dimension, K, the even element is the low nibble and the odd one the high nibble, each plus 8. Along
    any other, such as N, the two are rows, the even one in the low nibble, both in two's complement.

    Args:
        codes: int8, -8..7, any shape; the size of `dim` is even. The values are not checked: that would wait for the
            device.
        dim: the dimension to halve.

    Returns:
        uint8, contiguous.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype or shape.
    """
    check_tensors({"codes": codes})
    if codes.dtype != torch.int8:
        raise TypeError(f"codes has dtype {codes.dtype}; it must be torch.int8")
    dim = _dimension(codes, dim, "codes")
    if codes.shape[dim] % 2:
        raise ValueError(f"codes has shape {tuple(codes.shape)}; dimension {dim} must be even: two codes share a byte")
    offset = 8 if dim == codes.dim() - 1 else 0
    low, high = (codes + offset).view(torch.uint8).unflatten(dim, (-1, 2)).unbind(dim + 1)
    return (low & 0xF) | (high << 4)


def unpack_int4(packed: Tensor, dim: int) -> Tensor:
    """The inverse of `pack_int4`, with the same `dim`.

    Args:
        packed: uint8, any shape.

    Returns:
        int8, -8..7, contiguous, twice as large in `dim`.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype or shape.
    """
    check_tensors({"packed": packed})
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed has dtype {packed.dtype}; it must be torch.uint8")
    dim = _dimension(packed, dim, "packed")
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim + 1).flatten(dim, dim + 1).to(torch.int8)
    return nibbles - 8 if dim == packed.dim() - 1 else (nibbles ^ 8) - 8  # the sign bit of a nibble counts -8


def _dimension(x: Tensor, dim: int, name: str) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim is {dim}; {name} has {x.dim()} dimensions")
    return dim % x.dim()
