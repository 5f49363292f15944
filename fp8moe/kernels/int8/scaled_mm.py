"""Kernel: one int8 matrix product, its int32 sums scaled once, by token and by channel."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.int8.platform import MAX_INT32, Tile
from fp8moe.kernels.int8.products import exact_dot, tile_in_bands
from fp8moe.kernels.launch import ceil_div, launch


@triton.jit
def int8_scaled_mm_kernel(
    a,  # int8 (M, K), features side by side
    w,  # int8 (N, K), likewise
    a_scale,  # fp32 (M,)
    b_scale,  # fp32 (N,)
    bias,  # (N,) or None
    out,  # (M, N) contiguous
    M, N, K, a_stride, w_stride,
    IN_FP16: tl.constexpr, WIDE: tl.constexpr, MASK_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows x COLUMNS columns. As in `int8_grouped_mm_kernel` the weight is on the left."""
    tile_row, tile_column = tile_in_bands(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, COLUMNS), BAND)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    # What is past the last is the last again, and is not stored.
    own_row, own_column = tl.minimum(row, M - 1), tl.minimum(column, N - 1)
    if WIDE:
        own_row, own_column = own_row.to(tl.int64), own_column.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_offsets = (own_row * a_stride)[None, :] + k[:, None]
    w_offsets = (own_column * w_stride)[:, None] + k[None, :]
    total = tl.zeros((COLUMNS, BLOCK_M), tl.int32)
    for start in range(0, K, BLOCK_K):
        if MASK_K:
            inside = start + k < K
            a_codes = tl.load(a + start + a_offsets, mask=inside[:, None], other=0)
            w_codes = tl.load(w + start + w_offsets, mask=inside[None, :], other=0)
        else:
            a_codes = tl.load(a + start + a_offsets)
            w_codes = tl.load(w + start + w_offsets)
        total = exact_dot(w_codes, a_codes, total, IN_FP16)
    scale = tl.load(b_scale + own_column)[:, None] * tl.load(a_scale + own_row)[None, :]
    if bias is None:
        result = total.to(tl.float32) * scale
    else:
        added = tl.load(bias + own_column).to(tl.float32)[:, None]
        result = tl.fma(total.to(tl.float32), scale, tl.broadcast_to(added, scale.shape))
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], tl.trans(result), mask=inside)


def launch_int8_scaled_mm(
    a: Tensor, w: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor, *, block_rows: int,
    tile: Tile, in_fp16: bool,
) -> None:  # fmt: skip
    """Fill `out` `(M, N)` from `a` `(M, K)` and `w` `(N, K)`, both with contiguous features."""
    num_rows, num_columns = out.shape
    columns = tile.rows * tile.parts
    launch(
        int8_scaled_mm_kernel, ceil_div(num_rows, block_rows) * ceil_div(num_columns, columns),
        a, w, a_scale, b_scale, bias, out, num_rows, num_columns, a.shape[1], a.stride(0), w.stride(0),
        IN_FP16=in_fp16, WIDE=max(num_rows * a.stride(0), num_columns * w.stride(0)) > MAX_INT32,
        MASK_K=a.shape[1] % tile.block_k != 0, COLUMNS=columns, BLOCK_M=block_rows, BLOCK_K=tile.block_k,
        BAND=tile.band, **tile.options,
    )  # fmt: skip
