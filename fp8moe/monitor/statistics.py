"""The definition of what is measured of an operand, in plain PyTorch; and the sample that it is measured on.

A sample is quantized by the reference, in the tiles and with the scale format of the operand. With `x` the sample in
fp32, `code` and `scale` what `quantize/reference.py` makes of it, and sums over the elements that are not zero:

    underflow   = share of those whose code is zero
    saturation  = share of those whose code is the largest, 448
    sqnr_db     = 10 * log10(sum of x**2 / sum of (x - code * scale)**2)
    amax        = the largest |x|
    not_finite  = share of those that are NaN or infinite

Tiles that hold what is not finite are left out of all but the last. A scale is made from its own tile's largest
element, so nothing is ever clipped: `saturation` says how much of a tile is as large as its largest element, within
half a step of the format. That is 1/128 where there is one such element; much more means values that are nearly all
alike, or pile up at a clamp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import BLOCK, RowOperand, TokenGroups
from fp8moe.quantize import reference

NAMES = ("underflow", "saturation", "sqnr_db", "amax", "not_finite")
"""Of the statistics, in the order of `of_tiles`."""

EXACT = 1e-15
"""The least noise, relative to the signal: what is exact counts as 150 dB."""


def of_tiles(x: Tensor, tile_dims: tuple[int, ...], scale_format: ScaleFormat) -> Tensor:
    """The statistics `NAMES` of `x`, fp32 of any shape whose `tile_dims` lie within a tile; fp32 `(5,)`.

    Where all elements are zeros the shares are zero, and `sqnr_db` is NaN.
    """
    data, scale = reference.quantize_tiles(x, tile_dims, scale_format)
    codes, is_finite = data.float(), x.isfinite()
    usable = codes.isfinite()  # all or nothing of a tile
    is_value = x != 0
    num_values = is_value.sum().clamp(min=1)
    values = torch.where(usable, x, 0.0)
    amax = torch.where(is_finite, x.abs(), 0.0).amax()
    unit = torch.where(amax > 0, amax, 1.0)  # squares of tiny values would vanish
    restored = torch.where(usable, codes * scale, 0.0)
    signal = (values / unit).square().sum()
    noise = ((values - restored) / unit).square().sum()
    return torch.stack(
        [
            (is_value & (codes == 0)).sum() / num_values,
            (codes.abs() == reference.E4M3_MAX).sum() / num_values,
            10 * torch.log10(signal / noise.clamp(min=EXACT * signal)),
            amax,
            (~is_finite).sum() / num_values,
        ]
    )


def of_rows(x: Tensor, scale_format: ScaleFormat) -> Tensor:
    """Of `x`, fp32 `(rows, D)`, as a row operand: tiles of one row and 128 features."""
    padded = F.pad(x, (0, -x.shape[1] % BLOCK))
    return of_tiles(padded.unflatten(1, (-1, BLOCK)), (2,), scale_format)


def of_tokens(x: Tensor, scale_format: ScaleFormat) -> Tensor:
    """Of `x`, fp32 `(whole blocks of 128 rows, D)`, as a token operand: tiles of 128 rows and one feature."""
    return of_tiles(x.unflatten(0, (-1, BLOCK)), (1,), scale_format)


def of_weight(x: Tensor, scale_format: ScaleFormat) -> Tensor:
    """Of `x`, fp32 `(bands, 128, K)`, each band 128 rows of an expert's matrix: tiles of 128 x 128."""
    padded = F.pad(x, (0, -x.shape[2] % BLOCK))
    return of_tiles(padded.unflatten(2, (-1, BLOCK)), (1, 3), scale_format)


def padded_rows_of(groups: TokenGroups, phase: float, num_blocks: int) -> Tensor:
    """int64 `(num_blocks * 128,)`: the padded rows of blocks that lie evenly among those of all groups.

    There must be a padded row. The device alone knows how many blocks there are, so it chooses.

    Args:
        groups: where rows lie.
        phase: from 0 to 1: which blocks, of those that lie as evenly.
        num_blocks: how many; some are the same if there are fewer.
    """
    count = groups.padded_ends[-1] // BLOCK
    share = (torch.arange(num_blocks, device=count.device) + phase) / num_blocks
    block = (share * count).long().clamp(max=groups.capacity // BLOCK - 1)
    return (block[:, None] * BLOCK + torch.arange(BLOCK, device=count.device)).flatten()


def rows_of(num_rows: int, phase: float, at_most: int, device: torch.device) -> Tensor:
    """int64: the numbers of `at_most` of `num_rows` rows, evenly spread; all if there are no more."""
    if num_rows <= at_most:
        return torch.arange(num_rows, device=device)
    share = (torch.arange(at_most, device=device) + phase) / at_most
    return (share * num_rows).long().clamp(max=num_rows - 1)


def taken(x: Tensor, source: Tensor) -> Tensor:
    """fp32: the rows `source` of `x` `(M, D)`; zeros where it is negative."""
    return x[source.clamp(min=0)].float().masked_fill((source < 0)[:, None], 0.0)


def taken_from_operand(x: RowOperand, rows: Tensor, is_padding: Tensor) -> Tensor:
    """The padded rows `rows` of a row operand, fp32, rounded to bf16 as where they are used; zeros on padding."""
    tiles = x.data[rows].float().unflatten(1, (-1, BLOCK)) * x.scale[rows][:, :, None]
    return tiles.flatten(1).bfloat16().float().masked_fill(is_padding[:, None], 0.0)
