"""UE8M0: power-of-two scales as their exponents alone, four to a 32-bit word.

A byte `e` stands for `2**(e - 127)`, and 255 for NaN. These are the exponent bits of fp32, except that 0 stands for the
subnormal `2**-127`. The first of four groups is in the lowest byte; the bytes past a row's last group are zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SUBNORMAL_BITS = 0x00400000
"""fp32 `2**-127`, whose exponent bits are 0."""
NAN_BITS = 0x7FC00000


def pack_ue8m0(scale: Tensor) -> Tensor:
    """Pack power-of-two scales, four neighbours of the last dimension to a word.

    Args:
        scale: fp32 `(..., groups)`, powers of two from `2**-127` to `2**127`, or NaN.

    Returns:
        int32 `(..., ceil(groups / 4))`, contiguous.

    Raises:
        TypeError: `scale` is not an fp32 tensor.
        ValueError: `scale` has no dimension; or, on a CPU, it holds something else. On a GPU, where looking would wait
            for the device, other values lose sign and mantissa.
    """
    _check_tensor("scale", scale, torch.float32)
    bits = scale.view(torch.int32)
    exponents = (bits >> 23) & 0xFF
    if not scale.is_cuda and not torch.compiler.is_compiling():
        wrong = bits != _bits_of(exponents)
        wrong &= ~scale.isnan()
        if wrong.any():
            raise ValueError(
                f"scale holds {float(scale[wrong][0])!r}; every value must be a power of two or NaN: quantize with "
                "ScaleFormat.POW2"
            )
    num_groups = scale.shape[-1]
    four = F.pad(exponents, (0, -num_groups % 4)).unflatten(-1, (-1, 4))
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scale.device)
    return (four << shifts).sum(-1, dtype=torch.int32)


def unpack_ue8m0(packed: Tensor, num_groups: int) -> Tensor:
    """The inverse of `pack_ue8m0`.

    Args:
        packed: int32 `(..., words)`, any strides.
        num_groups: `groups`, from `4 * words - 3` to `4 * words`.

    Returns:
        fp32 `(..., groups)`, contiguous.

    Raises:
        TypeError: `packed` is not an int32 tensor.
        ValueError: `packed` has no dimension, or `num_groups` does not fit it.
    """
    _check_tensor("packed", packed, torch.int32)
    words = packed.shape[-1]
    if -(-num_groups // 4) != words:
        raise ValueError(
            f"num_groups is {num_groups} and packed has {words} words a row, which hold 4 groups each; "
            f"it must be {max(0, 4 * words - 3)} to {4 * words}"
        )
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    exponents = (packed.unsqueeze(-1) >> shifts) & 0xFF
    return _bits_of(exponents.flatten(-2)[..., :num_groups]).contiguous().view(torch.float32)


def _bits_of(exponents: Tensor) -> Tensor:
    """int32: the fp32 bits of what these exponent bytes (int32) stand for."""
    bits = torch.where(exponents == 0, SUBNORMAL_BITS, exponents << 23)
    return torch.where(exponents == 0xFF, NAN_BITS, bits)


def _check_tensor(name: str, value: object, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {dtype}")
    if value.dim() == 0:
        raise ValueError(f"{name} has no dimension; the groups of a row must be its last")
