"""The definition of integer quantization, in plain PyTorch, bit for bit; the kernels must equal it exactly.

For one tile, a row or a part of one, with `levels` 127 (INT8) or 7 (INT4), in fp32 with correctly rounded divisions:

    amax  = max|x|
    scale = max(amax, 2**-100) / levels        1 where amax is 0
    code  = round(x * (levels / max(amax, 2**-100)))

The product is rounded once, from its exact value, to an integer: half to even, or half away from zero. The scale is the
*dequantization* factor: `x ~= code * scale`. Integers have no NaN: a tile whose amax is NaN or infinite has the scale
NaN and codes of 0, so that everything computed from it is NaN.
"""

import torch
from torch import Tensor

AMAX_FLOOR = 2.0**-100
INT8_LEVELS, INT4_LEVELS = 127, 7


def scaling(amax: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The scales of tiles with these maxima (fp32), and what to multiply the tiles by: 0 where one is not finite."""
    finite = amax.isfinite()
    floored = torch.where(finite, amax, 1.0).clamp(min=AMAX_FLOOR)
    # Divide tensor by tensor: with a Python scalar PyTorch multiplies by a rounded reciprocal instead.
    top = torch.full_like(floored, levels)
    scale = torch.where(amax == 0, 1.0, floored / top)
    return torch.where(finite, scale, torch.nan), torch.where(finite, top / floored, 0.0)


def encode(x: Tensor, factor: Tensor, away: bool) -> Tensor:
    """int8 codes of `x * factor`. Products of two fp32 numbers are exact in fp64."""
    exact = x.double() * factor.double()
    rounded = exact.sign() * (exact.abs() + 0.5).floor() if away else exact.round()
    return torch.where(factor > 0, rounded, 0.0).to(torch.int8)


def quantize_tiles(x: Tensor, tile: int, levels: int, away: bool) -> tuple[Tensor, Tensor]:
    """fp32 `(M, K)` to int8 codes `(M, K)` and fp32 scales `(M, ceil(K / tile))`: one for `tile` features of a row."""
    codes, scales = [], []
    for part in x.split(tile, dim=1):
        scale, factor = scaling(part.abs().amax(1, keepdim=True), levels)
        codes.append(encode(part, factor, away))
        scales.append(scale)
    return torch.cat(codes, 1), torch.cat(scales, 1)
