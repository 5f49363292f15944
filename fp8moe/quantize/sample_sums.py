"""What quantization does to a sample of an operand, summed up on the device: see `monitor/statistics.py`.

A sample is some blocks of 128 rows. It is quantized by the reference in the tiles of an operand. With `x` the sample in
fp32, `code` and `scale` what `reference.py` makes of it:

    0  how many x are not zero
    1  how many codes are not zero
    2  how many codes are the largest, 448
    3  how many x are NaN or infinite
    4  sum of x**2
    5  sum of (x - code * scale)**2
    6  the largest |x|

Tiles that hold what is not finite count in 0, in 1 as if nothing of them became zero, and in 3. Sums are in fp64, where
no square of an fp32 value vanishes or passes what it holds; the order in which they are added up is not defined.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_triton_fp8
from fp8moe.operands import BLOCK
from fp8moe.quantize import reference

NUM_SUMS = 7
MAX_BLOCKS = 4
"""That `blocks` names, at most."""


def add_sample_sums(
    x: Tensor, source: Tensor | None, blocks: Sequence[int], scale_format: ScaleFormat, *,
    by_row: Tensor | None = None, by_token: Tensor | None = None, by_block: Tensor | None = None,
) -> None:  # fmt: skip
    """Add the sums of a sample to fp64 `(7,)`, one for each kind of tile. One launch, and the host does not wait.

    It is no operator of PyTorch: whoever traces is to see nothing of it.

    Args:
        x: `(M, D)` or `(E, N, D)` in any float dtype and strides.
        source: int64 `(n * 128,)`: the rows of the sample, in `x` `(M, D)`; -1 stands for zeros. Or None:
        blocks: then at most 4 numbers of blocks of 128 rows; each matrix of `x` begins with a new block, and what its
            last one lacks is filled up with zeros.
        scale_format: as in `FP8Config`.
        by_row: of tiles of a row and 128 features.
        by_token: of tiles of 128 rows and one feature.
        by_block: of tiles of 128 x 128.

    Raises:
        ValueError: there are more than 4 `blocks`.
    """
    if len(blocks) > MAX_BLOCKS:
        raise ValueError(f"blocks are {len(blocks)}; they must be at most {MAX_BLOCKS}: sample fewer rows at once")
    if runs_triton_fp8(x.device):
        from fp8moe.kernels.sample_sums import launch_sample_sums

        pow2 = scale_format is ScaleFormat.POW2
        launch_sample_sums(x, source, blocks, by_row, by_token, by_block, pow2=pow2)
    else:
        add_by_torch(x, source, blocks, scale_format, by_row, by_token, by_block)


@torch.no_grad()
def add_by_torch(
    x: Tensor, source: Tensor | None, blocks: Sequence[int], scale_format: ScaleFormat,
    by_row: Tensor | None, by_token: Tensor | None, by_block: Tensor | None,
) -> None:  # fmt: skip
    """The definition."""
    sample = sample_of(x, source, blocks)
    for sums, tiles_of in ((by_row, row_tiles), (by_token, token_tiles), (by_block, block_tiles)):
        if sums is not None and sample.numel():
            added = sums_of(tiles_of(sample), scale_format)
            sums.copy_(torch.cat([sums[:-1] + added[:-1], torch.maximum(sums[-1:], added[-1:])]))


def sample_of(x: Tensor, source: Tensor | None, blocks: Sequence[int]) -> Tensor:
    """fp32 `(n, 128, D)`."""
    if source is not None:
        return taken(x, source).unflatten(0, (-1, BLOCK))
    matrices = x if x.dim() == 3 else x[None]
    of_matrix = -(-x.shape[-2] // BLOCK)
    chosen = [x.new_zeros(0, BLOCK, x.shape[-1], dtype=torch.float32)]
    for block in blocks:
        rows = matrices[block // of_matrix, block % of_matrix * BLOCK :][:BLOCK].float()
        chosen.append(F.pad(rows, (0, 0, 0, BLOCK - rows.shape[0]))[None])
    return torch.cat(chosen)


def taken(x: Tensor, source: Tensor) -> Tensor:
    """fp32: the rows `source` of `x` `(M, D)`; zeros where it is negative."""
    return x[source.clamp(min=0)].float().masked_fill((source < 0)[:, None], 0.0)


def row_tiles(sample: Tensor) -> Tensor:
    """Of a row and 128 features: `(tiles, 128)`."""
    return _whole(sample).reshape(-1, BLOCK)


def token_tiles(sample: Tensor) -> Tensor:
    """Of 128 rows and one feature: `(tiles, 128)`."""
    return sample.transpose(1, 2).reshape(-1, BLOCK)


def block_tiles(sample: Tensor) -> Tensor:
    """Of 128 x 128: `(tiles, 16384)`."""
    return _whole(sample).unflatten(2, (-1, BLOCK)).transpose(1, 2).reshape(-1, BLOCK * BLOCK)


def _whole(sample: Tensor) -> Tensor:
    return F.pad(sample, (0, -sample.shape[2] % BLOCK))


def sums_of(tiles: Tensor, scale_format: ScaleFormat) -> Tensor:
    """fp64 `(7,)`, of fp32 `(tiles, elements of a tile)`."""
    data, scale = reference.quantize_tiles(tiles, (1,), scale_format)
    spoilt = scale.isnan()
    codes, finite = data.float().masked_fill(spoilt, 0.0), tiles.masked_fill(spoilt, 0.0)
    noise = finite.double() - codes.double() * scale.masked_fill(spoilt, 0.0).double()
    return torch.stack(
        [
            (tiles != 0).sum().double(),
            torch.where(spoilt, tiles, codes).ne(0).sum().double(),
            (codes.abs() == reference.E4M3_MAX).sum().double(),
            (tiles - tiles != 0).sum().double(),
            finite.double().square().sum(),
            noise.square().sum(),
            finite.abs().amax().double(),
        ]
    )
