"""Kernel: what quantization does to a sample, summed up. `quantize/sample_sums.py` is its definition."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.kernels.numerics import dequantization_scale, encode_e4m3, maximum, quantization_factor
from fp8moe.operands import BLOCK

MAX_BLOCKS = 4


@triton.jit
def add_sums(values, amax, sums, POW2: tl.constexpr):
    """Add those of tiles with these maxima, of the shape of `values` with 1 where a tile lies."""
    is_finite = amax < float("inf")
    scale = dequantization_scale(amax, POW2)
    codes = encode_e4m3(values, quantization_factor(amax, scale, POW2)).to(tl.float32)
    codes = tl.where(is_finite, codes, 0.0)
    x = tl.where(is_finite, values, 0.0).to(tl.float64)  # in fp64 no square vanishes
    noise = x - codes.to(tl.float64) * tl.where(is_finite, scale, 0.0).to(tl.float64)
    tl.atomic_add(sums, tl.sum((values != 0.0).to(tl.int32)).to(tl.float64))
    tl.atomic_add(sums + 1, tl.sum((tl.where(is_finite, codes, values) != 0.0).to(tl.int32)).to(tl.float64))
    tl.atomic_add(sums + 2, tl.sum((tl.abs(codes) == 448.0).to(tl.int32)).to(tl.float64))
    tl.atomic_add(sums + 3, tl.sum((values - values != 0.0).to(tl.int32)).to(tl.float64))
    tl.atomic_add(sums + 4, tl.sum(x * x))
    tl.atomic_add(sums + 5, tl.sum(noise * noise))
    tl.atomic_max(sums + 6, tl.max(tl.where(is_finite, amax, 0.0)).to(tl.float64))


@triton.jit(do_not_specialize=["block0", "block1", "block2", "block3"])
def sample_sums_kernel(
    x,  # (E, num_rows, num_features)
    source,  # int64 (blocks * 128,): rows of x[0], -1 for zeros; or None
    by_row, by_token, by_block,  # fp64 (7,) each, or None
    stride_matrix, stride_row, stride_feature, num_rows, num_features,
    block0, block1, block2, block3,  # without `source`: which blocks of 128 rows
    POW2: tl.constexpr,
):  # fmt: skip
    """One program takes 128 rows x 128 features."""
    column_blocks = tl.cdiv(num_features, 128)
    number = tl.program_id(0) // column_blocks
    feature = (tl.program_id(0) % column_blocks * 128 + tl.arange(0, 128)).to(tl.int64)
    if source is not None:
        row = tl.load(source + number * 128 + tl.arange(0, 128))
        start = x
        is_row = row >= 0
    else:
        block = tl.where(number == 0, block0, tl.where(number == 1, block1, tl.where(number == 2, block2, block3)))
        blocks = tl.cdiv(num_rows, 128)
        row = (block % blocks * 128 + tl.arange(0, 128)).to(tl.int64)
        start = x + (block // blocks).to(tl.int64) * stride_matrix
        is_row = row < num_rows
    places = row[:, None] * stride_row + feature[None, :] * stride_feature
    values = tl.load(start + places, mask=is_row[:, None] & (feature < num_features)[None, :], other=0.0).to(tl.float32)
    magnitudes = tl.abs(values)
    of_columns = tl.reduce(magnitudes, 0, maximum)
    if by_row is not None:
        add_sums(values, tl.reduce(magnitudes, 1, maximum)[:, None], by_row, POW2)
    if by_token is not None:
        add_sums(values, of_columns[None, :], by_token, POW2)
    if by_block is not None:
        add_sums(values, tl.reduce(of_columns[None, :], 1, maximum)[:, None], by_block, POW2)


def launch_sample_sums(
    x: Tensor, source: Tensor | None, blocks: Sequence[int], by_row: Tensor | None, by_token: Tensor | None,
    by_block: Tensor | None, *, pow2: bool,
) -> None:  # fmt: skip
    """See `add_sample_sums`; `source` is contiguous."""
    num_rows, num_features = x.shape[-2:]
    count = len(blocks) if source is None else source.shape[0] // BLOCK
    if not count or not num_features:
        return
    launch(
        sample_sums_kernel, count * ceil_div(num_features, BLOCK), x, source, by_row, by_token, by_block,
        x.stride(0) if x.dim() == 3 else 0, x.stride(-2), x.stride(-1), num_rows, num_features,
        *blocks, *[0] * (MAX_BLOCKS - len(blocks)), POW2=pow2, num_warps=16,
    )  # fmt: skip
