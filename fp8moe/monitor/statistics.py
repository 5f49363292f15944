"""The definition of what is measured of an operand, and the sample that it is measured on.

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

The device makes sums (`quantize/sample_sums.py`); the host does the rest (`from_sums`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.operands import BLOCK, RowOperand, TokenGroups

NAMES = ("underflow", "saturation", "sqnr_db", "amax", "not_finite")
"""Of the statistics, in the order of `from_sums`."""

EXACT = 1e-15
"""The least noise, relative to the signal: what is exact counts as 150 dB."""


def from_sums(sums: Sequence[float]) -> list[float]:
    """The statistics `NAMES` of an operand, of its `sample_sums`.

    Where all elements are zeros the shares are zero, and `sqnr_db` is NaN.
    """
    values, kept, largest, not_finite, signal, noise, amax = sums
    count = max(values, 1)
    sqnr = 10 * math.log10(signal / max(noise, EXACT * signal)) if signal else math.nan
    return [(values - kept) / count, largest / count, sqnr, amax, not_finite / count]


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


def taken_from_operand(x: RowOperand, rows: Tensor) -> Tensor:
    """The padded rows `rows` of a row operand, fp32, rounded to bf16 as where they are used."""
    tiles = x.data[rows].float().unflatten(1, (-1, BLOCK)) * x.scale[rows][:, :, None]
    return tiles.flatten(1).bfloat16().float()
