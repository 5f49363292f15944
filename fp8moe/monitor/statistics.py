"""The definition of what is measured of an operand, in plain PyTorch; and the sample that it is measured on.

A sample is quantized by the reference, in the tiles and with the scale format of the operand. With `x` the sample in
fp32, `code` and `scale` what `quantize/reference.py` makes of it, and sums over the elements that are not zero:

    underflow   = share of those whose code is zero
    saturation  = share of those whose code is the largest, 448
    sqnr_db     = 10 * log10(sum of x**2 / sum of (x - code * scale)**2)
    amax        = the largest |x|
    not_finite  = share of those that are NaN or infinite

Tiles that hold what is not finite count in the last alone. A scale is made from its own tile's largest element, so
nothing is ever clipped: `saturation` says how much of a tile is as large as its largest element, within half a step of
the format. That is 1/128 where there is one such element; much more means values that are nearly all alike, or pile up
at a clamp.

The device makes sums of several operands at once, since launches are what this costs (`sums_of`); the host does the
rest (`from_sums`).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import BLOCK, RowOperand, TokenGroups
from fp8moe.quantize import reference

NAMES = ("underflow", "saturation", "sqnr_db", "amax", "not_finite")
"""Of the statistics, in the order of `from_sums`."""

EXACT = 1e-15
"""The least noise, relative to the signal: what is exact counts as 150 dB."""


def sums_of(tiles: Sequence[Tensor], scale_format: ScaleFormat) -> Tensor:
    """What the statistics of several operands are made of, by `from_sums`.

    Args:
        tiles: of each operand fp32 `(tiles, elements of a tile)`, all tiles as long.
        scale_format: of all.

    Returns:
        fp32 `(operands, 7)`: how many elements are not zero, have a code that is not zero, have the largest code, are
        not finite; signal and noise, in units of the square of the largest element of all operands; amax.
    """
    x = torch.cat([*tiles])
    data, scale = reference.quantize_tiles(x, (1,), scale_format)
    codes, spoilt = data.float(), scale.isnan()
    values, restored = x.masked_fill(spoilt, 0.0), (codes * scale).masked_fill(spoilt, 0.0)
    amax = values.abs().amax(1)
    unit = amax.amax().clamp(min=torch.finfo(torch.float32).tiny)  # squares of tiny values would vanish
    of_tiles = torch.stack(
        [
            (x != 0).sum(1).float(),
            torch.where(spoilt, x, codes).ne(0).sum(1).float(),
            (codes.abs() == reference.E4M3_MAX).sum(1).float(),
            (x - x != 0).sum(1).float(),
            (values / unit).square().sum(1),
            ((values - restored) / unit).square().sum(1),
        ]
    )
    sizes = [len(part) for part in tiles]
    sums = torch.stack([part.sum(1) for part in of_tiles.split(sizes, 1)])
    return torch.cat([sums, torch.stack([part.amax() for part in amax.split(sizes)])[:, None]], 1)


def from_sums(sums: Sequence[float]) -> list[float]:
    """The statistics `NAMES` of an operand, of its 7 `sums_of`.

    Where all elements are zeros the shares are zero, and `sqnr_db` is NaN.
    """
    values, kept, largest, not_finite, signal, noise, amax = sums
    count = max(values, 1)
    sqnr = 10 * math.log10(signal / max(noise, EXACT * signal)) if signal else math.nan
    return [(values - kept) / count, largest / count, sqnr, amax, not_finite / count]


def row_tiles(x: Tensor) -> Tensor:
    """Of `x`, fp32 `(rows, D)`, as a row operand: of one row and 128 features; `(tiles, 128)`."""
    return F.pad(x, (0, -x.shape[1] % BLOCK)).view(-1, BLOCK)


def token_tiles(x: Tensor) -> Tensor:
    """Of `x`, fp32 `(whole blocks of 128 rows, D)`, as a token operand: of 128 rows and one feature; `(tiles, 128)`."""
    return x.unflatten(0, (-1, BLOCK)).transpose(1, 2).reshape(-1, BLOCK)


def weight_tiles(x: Tensor) -> Tensor:
    """Of `x`, fp32 `(bands, 128, K)`, each band 128 rows of an expert's matrix: of 128 x 128; `(tiles, 16384)`."""
    padded = F.pad(x, (0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))
    return padded.transpose(1, 2).reshape(-1, BLOCK * BLOCK)


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
