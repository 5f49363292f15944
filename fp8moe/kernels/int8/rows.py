"""Kernel: rows to int8 (or codes of fewer levels), as they are, smoothed, or as SwiGLU makes them."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.gated import swiglu
from fp8moe.kernels.int8.numerics import encode, scaling
from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from
from fp8moe.kernels.numerics import row_amax

MAX_COLUMNS = 8192  # of a row that a program holds at once
ELEMENTS = 4096  # of a program's tile, where rows are shorter
ENDS = 256  # compared at once


@triton.jit
def experts_of_rows(ends, row, E, ENDS: tl.constexpr):
    """How many groups end at or before each row: E for a row of no group."""
    expert = tl.zeros(row.shape, tl.int32)
    for first in range(0, E, ENDS):
        number = first + tl.arange(0, ENDS)
        end = tl.load(ends + number, mask=number < E, other=0x7FFFFFFF)
        expert += tl.sum((end[None, :] <= row[:, None]).to(tl.int32), axis=1)
    return expert


@triton.jit
def load_values(
    x, inv_smooth, source, expert, live, column, inside, stride_row, K, UP, SMOOTH: tl.constexpr, SWIGLU: tl.constexpr
):  # fmt: skip
    """fp32 `(rows, columns)`: what is to be quantized; zeros where nothing is."""
    mask = live[:, None] & inside[None, :]
    at = x + source[:, None] * stride_row + column[None, :]
    values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:  # UP is how far up lies behind the gate, or before it
        values = swiglu(values, tl.load(at + UP, mask=mask, other=0.0).to(tl.float32), ())
    if SMOOTH:
        smooth = inv_smooth + expert.to(tl.int64)[:, None] * K + column[None, :]
        values = values * tl.load(smooth, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def quantize_rows_kernel(
    x,  # (rows, K), rows of stride_row; for SwiGLU the gate's features begin here
    inv_smooth,  # (E, K) contiguous or None
    ends,  # int32 (E,) or None
    row_source,  # int32 (M,): the row of `x` to read; or None: the same
    codes,  # int8 (M, K) contiguous; in the dtype of `x` where nothing is quantized
    scales,  # fp32 (M, tiles) contiguous or None: nothing is quantized
    M, K, E, TILE, tiles, stride_row, UP,
    LEVELS: tl.constexpr, AWAY: tl.constexpr, SWIGLU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE_PASS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """One program quantizes one tile of each of ROWS rows. What is longer than COLUMNS is read twice."""
    SMOOTH: tl.constexpr = inv_smooth is not None
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
    inside = row < M
    live = inside
    expert = row
    if SMOOTH:
        expert = experts_of_rows(ends, row, E, ENDS)
        live = live & (expert < E)
    source = row
    if row_source is not None:
        source = tl.load(row_source + row, mask=live, other=0)
    source, row = source.to(tl.int64), row.to(tl.int64)
    start, end = tile * TILE, tl.minimum(tile * TILE + TILE, K)

    column = start + tl.arange(0, COLUMNS)
    values = load_values(x, inv_smooth, source, expert, live, column, column < end, stride_row, K, UP, SMOOTH, SWIGLU)
    written = inside[:, None] & (column < end)[None, :]
    if scales is None:
        tl.store(codes + row[:, None] * K + column[None, :], values, mask=written)
    else:
        amax = row_amax(values)
        if not ONE_PASS:
            for first in range(start + COLUMNS, end, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                more = load_values(
                    x, inv_smooth, source, expert, live, column, column < end, stride_row, K, UP, SMOOTH, SWIGLU
                )
                amax = tl.maximum(amax, row_amax(more), propagate_nan=tl.PropagateNan.ALL)
        scale, factor = scaling(amax, LEVELS)
        tl.store(scales + row * tiles + tile, scale, mask=inside)
        factor = tl.broadcast_to(factor[:, None], values.shape)
        if ONE_PASS:
            tl.store(codes + row[:, None] * K + column[None, :], encode(values, factor, AWAY), mask=written)
        else:
            for first in range(start, end, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                more = load_values(
                    x, inv_smooth, source, expert, live, column, column < end, stride_row, K, UP, SMOOTH, SWIGLU
                )
                written = inside[:, None] & (column < end)[None, :]
                tl.store(codes + row[:, None] * K + column[None, :], encode(more, factor, AWAY), mask=written)


def launch_quantize_rows(
    x: Tensor, codes: Tensor, scales: Tensor | None, tile: int, levels: int, away: bool,
    inv_smooth: Tensor | None = None, ends: Tensor | None = None, row_source: Tensor | None = None,
    up: int | None = None,
) -> None:  # fmt: skip
    """Fill `codes` `(M, K)` and `scales` `(M, tiles)` from `x`, whose features are contiguous.

    `up`: SwiGLU, with up so many features behind the gate, which begins at the first element of `x`. Without `scales`
    the values themselves are written, to codes of any float dtype.
    """
    num_rows, num_features = codes.shape
    tile = min(tile, num_features)
    tiles = ceil_div(num_features, tile)
    if scales is None:
        tile, tiles = MAX_COLUMNS, ceil_div(num_features, MAX_COLUMNS)
        tile = min(tile, power_of_2_from(num_features))
    columns = min(power_of_2_from(tile), MAX_COLUMNS)
    rows = max(ELEMENTS // columns, 1)
    launch(
        quantize_rows_kernel, ceil_div(num_rows, rows) * tiles, x, inv_smooth, ends, row_source, codes, scales,
        num_rows, num_features, 0 if ends is None else ends.shape[0], tile, tiles, x.stride(0), up or 0,
        LEVELS=levels, AWAY=away, SWIGLU=up is not None, ROWS=rows, COLUMNS=columns, ONE_PASS=columns >= tile,
        ENDS=ENDS, num_warps=16 if columns * rows > ELEMENTS else 4,
    )  # fmt: skip
