"""Kernel: what quantization does to a sample, summed up. `quantize/sample_sums.py` is its definition."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.kernels.numerics import dequantization_scale, encode_e4m3, maximum, quantization_factor
from fp8moe.operands import BLOCK

ROWS = tl.constexpr(16)  # at once: sums in fp64 take many registers


@triton.jit
def some_rows(x, source, first, row, feature, stride_row, stride_feature, num_rows, num_features):
    """fp32 `(ROWS, 128)`: the rows of a sample from `first` on; without `source` those of `x` from `row + first` on."""
    number = first + tl.arange(0, ROWS)
    if source is not None:
        place = tl.load(source + number)
        is_row = place >= 0
    else:
        place = row + number
        is_row = place < num_rows
    places = place.to(tl.int64)[:, None] * stride_row + feature[None, :] * stride_feature
    mask = is_row[:, None] & (feature < num_features)[None, :]
    return tl.load(x + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def add_sums(
    x, source, row, feature, stride_row, stride_feature, num_rows, num_features, of_columns, sums,
    KIND: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Add those of 128 rows x 128 features, in tiles of a row (KIND 0), a feature (1) or all (2), by the maxima of the
    features."""
    nonzero, kept, largest, not_finite = (tl.zeros((ROWS,), tl.int32),) * 4
    signal, noise = (tl.zeros((ROWS,), tl.float64),) * 2
    top = tl.zeros((ROWS,), tl.float32)
    for first in range(0, 128, ROWS):
        values = some_rows(x, source, first, row, feature, stride_row, stride_feature, num_rows, num_features)
        if KIND == 0:
            amax = tl.reduce(tl.abs(values), 1, maximum)[:, None]
        elif KIND == 1:
            amax = of_columns[None, :]
        else:
            amax = tl.reduce(of_columns[None, :], 1, maximum)[:, None]
        is_finite = amax < float("inf")
        scale = dequantization_scale(amax, POW2)
        codes = encode_e4m3(values, quantization_factor(amax, scale, POW2)).to(tl.float32)
        codes = tl.where(is_finite, codes, 0.0)
        nonzero += tl.sum((values != 0.0).to(tl.int32), 1)
        kept += tl.sum((tl.where(is_finite, codes, values) != 0.0).to(tl.int32), 1)
        largest += tl.sum((tl.abs(codes) == 448.0).to(tl.int32), 1)
        not_finite += tl.sum((values - values != 0.0).to(tl.int32), 1)
        finite = tl.where(is_finite, values, 0.0)
        exact = finite.to(tl.float64)  # no square vanishes
        missing = exact - codes.to(tl.float64) * tl.where(is_finite, scale, 0.0).to(tl.float64)
        signal += tl.sum(exact * exact, 1)
        noise += tl.sum(missing * missing, 1)
        top = tl.maximum(top, tl.max(tl.abs(finite), 1))
    tl.atomic_add(sums, tl.sum(nonzero).to(tl.float64))
    tl.atomic_add(sums + 1, tl.sum(kept).to(tl.float64))
    tl.atomic_add(sums + 2, tl.sum(largest).to(tl.float64))
    tl.atomic_add(sums + 3, tl.sum(not_finite).to(tl.float64))
    tl.atomic_add(sums + 4, tl.sum(signal))
    tl.atomic_add(sums + 5, tl.sum(noise))
    tl.atomic_max(sums + 6, tl.max(top).to(tl.float64))


@triton.jit(do_not_specialize=["block0", "block1", "block2", "block3"])
def sample_sums_kernel(
    x,  # (E, num_rows, num_features)
    source,  # int64 (blocks * 128,): rows of x[0], -1 for zeros; or None
    by_row, by_token, by_block,  # fp64 (7,) each, or None
    stride_matrix, stride_row, stride_feature, num_rows, num_features,
    block0, block1, block2, block3,  # without `source`: which blocks of 128 rows
    POW2: tl.constexpr,
):  # fmt: skip
    """One program takes 128 rows x 128 features, and reads them some times, mostly from the cache."""
    column_blocks = tl.cdiv(num_features, 128)
    number = tl.program_id(0) // column_blocks
    feature = (tl.program_id(0) % column_blocks * 128 + tl.arange(0, 128)).to(tl.int64)
    row = 0
    if source is not None:
        source += number * 128
    else:
        block = tl.where(number == 0, block0, tl.where(number == 1, block1, tl.where(number == 2, block2, block3)))
        blocks = tl.cdiv(num_rows, 128)
        row = block % blocks * 128
        x += (block // blocks).to(tl.int64) * stride_matrix
    of_columns = tl.zeros((128,), tl.float32)
    if by_token is not None or by_block is not None:
        for first in range(0, 128, ROWS):
            values = some_rows(x, source, first, row, feature, stride_row, stride_feature, num_rows, num_features)
            of_columns = maximum(of_columns, tl.reduce(tl.abs(values), 0, maximum))
    if by_row is not None:
        add_sums(
            x, source, row, feature, stride_row, stride_feature, num_rows, num_features, of_columns, by_row, 0, POW2
        )  # fmt: skip
    if by_token is not None:
        add_sums(
            x, source, row, feature, stride_row, stride_feature, num_rows, num_features, of_columns, by_token, 1, POW2
        )  # fmt: skip
    if by_block is not None:
        add_sums(
            x, source, row, feature, stride_row, stride_feature, num_rows, num_features, of_columns, by_block, 2, POW2
        )  # fmt: skip


def launch_sample_sums(
    x: Tensor, source: Tensor | None, blocks: Sequence[int], by_row: Tensor | None, by_token: Tensor | None,
    by_block: Tensor | None, *, pow2: bool,
) -> None:  # fmt: skip
    """See `add_sample_sums`; `source` is contiguous, and there are four `blocks` at most."""
    num_rows, num_features = x.shape[-2:]
    count = len(blocks) if source is None else source.shape[0] // BLOCK
    if not count or not num_features:
        return
    block0, block1, block2, block3 = *blocks, *(0,) * (4 - len(blocks))  # raises ValueError if there are more
    launch(
        sample_sums_kernel, count * ceil_div(num_features, BLOCK), x, source, by_row, by_token, by_block,
        x.stride(0) if x.dim() == 3 else 0, x.stride(-2), x.stride(-1), num_rows, num_features,
        block0, block1, block2, block3, POW2=pow2, num_warps=8,
    )  # fmt: skip
