"""Kernel: the grouped product of `fp8moe.int8` with rows quantized in its loop, or summed up product by product.

Tiles, pipelining, order of tiles and epilogue are those of the kernel that it is measured against. Here a scale of the
weight, and one of the rows where they are quantized, belong to BLOCK_K elements of K, which divide K.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.int8.groups import RowTiles
from fp8moe.int8.weights import QuantizedWeight
from fp8moe.kernels.int8.grouped_mm import launch_int8_grouped_mm, load_scales, store_results
from fp8moe.kernels.int8.numerics import encode, scaling
from fp8moe.kernels.int8.platform import GroupedProduct, Platform, Tile, grouped_tile, platform_of
from fp8moe.kernels.int8.products import exact_dot, tile_in_bands, unpack_rows
from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.kernels.numerics import maximum

GROUP = 128
"""Elements of K that share a scale, of the weight, and of rows that are quantized in the loop."""


@triton.jit
def other_ways_kernel(
    a,  # int8, or float where QUANTIZE: (rows, K), or (K, rows) where RANK_ONE
    a_scale,  # fp32 (rows,) or None where QUANTIZE
    a_row,  # int32 (M,) or None
    w,  # int8 (E, BYTE_ROWS, K), or (E, K, BYTE_ROWS) where RANK_ONE
    w_scale,  # fp32 (E, groups of K, N)
    ends, tile_expert, tile_row,  # int32 (E,), (TILES,), (TILES,)
    row_weights,  # fp32 (M,) or None
    out,  # (M, N)
    TILES, N, K, BYTE_ROWS, stride_row, stride_k,
    QUANTIZE: tl.constexpr, RANK_ONE: tl.constexpr, INT4: tl.constexpr, SWIGLU: tl.constexpr, IN_PTX: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows x the features in PARTS tiles of ROWS byte rows of the weight."""
    PER_BYTE: tl.constexpr = 2 if INT4 else 1
    OPERANDS: tl.constexpr = PARTS * PER_BYTE
    STEP: tl.constexpr = ROWS if SWIGLU else PARTS * ROWS
    part_rows = BYTE_ROWS // 2 if SWIGLU else BYTE_ROWS
    tile, column = tile_in_bands(tl.program_id(0), TILES, tl.cdiv(part_rows, STEP), BAND)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    row = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    live = row < tl.load(ends + expert)
    source = tl.where(live, row, 0) if a_row is None else tl.load(a_row + row, mask=live, other=0)
    k = tl.arange(0, BLOCK_K)
    a_offsets = (source * stride_row)[None, :] + (k * stride_k)[:, None]
    w += expert * BYTE_ROWS * K
    byte_row = column * STEP + tl.arange(0, ROWS)
    own_rows, features = (), ()
    for p in tl.static_range(PARTS):
        own_row = tl.minimum(byte_row + (0 if SWIGLU else p * ROWS), part_rows - 1)
        own_row += p * part_rows if SWIGLU else 0
        own_rows = own_rows + (own_row,)
        for i in tl.static_range(PER_BYTE):
            features = features + (own_row * PER_BYTE + i,)
    w_scale += expert * (2 * N if SWIGLU else N) * (K // BLOCK_K)
    totals = ()
    for _ in tl.static_range(OPERANDS):
        totals = totals + (tl.zeros((ROWS, BLOCK_M), tl.float32),)
    for block in tl.range(K // BLOCK_K, num_stages=STAGES):
        start = block * BLOCK_K
        w_scales = load_scales(w_scale, features, block, 2 * N if SWIGLU else N, 1, INT4, OPERANDS)
        if QUANTIZE or not RANK_ONE:
            a_values = tl.load(a + start * stride_k + a_offsets)
        if QUANTIZE:
            a_values = a_values.to(tl.float32)
            scale_of_a, factor = scaling(tl.reduce(tl.abs(a_values), 0, maximum), 127)
            if not RANK_ONE:
                a_values = encode(a_values, tl.broadcast_to(factor[None, :], a_values.shape), False)
        sums = ()
        if RANK_ONE:
            for _ in tl.static_range(OPERANDS):
                sums = sums + (tl.zeros((ROWS, BLOCK_M), tl.int32),)
            for j in range(BLOCK_K):
                a_codes = tl.load(a + (start + j) * stride_k + source * stride_row)
                if QUANTIZE:
                    a_codes = encode(a_codes.to(tl.float32), factor, False)
                added = ()
                for p in tl.static_range(PARTS):
                    codes = tl.load(w + (start + j) * BYTE_ROWS + own_rows[p])
                    operands = unpack_rows(codes, INT4, False)
                    for i in tl.static_range(PER_BYTE):
                        product = operands[i].to(tl.int32)[:, None] * a_codes.to(tl.int32)[None, :]
                        added = added + (sums[p * PER_BYTE + i] + product,)
                sums = added
        else:
            for p in tl.static_range(PARTS):
                codes = tl.load(w + start + (own_rows[p] * K)[:, None] + k[None, :])
                operands = unpack_rows(codes, INT4, IN_PTX)
                for i in tl.static_range(PER_BYTE):
                    sums = sums + (exact_dot(operands[i], a_values, tl.zeros((ROWS, BLOCK_M), tl.int32), False),)
        new_totals = ()
        for number in tl.static_range(OPERANDS):
            scale = tl.broadcast_to(w_scales[number][:, None], (ROWS, BLOCK_M))
            if QUANTIZE:
                scale = scale * scale_of_a[None, :]
            new_totals = new_totals + (tl.fma(sums[number].to(tl.float32), scale, totals[number]),)
        totals = new_totals

    factor_of_row = tl.full((BLOCK_M,), 1.0, tl.float32)
    if not QUANTIZE:
        factor_of_row = tl.load(a_scale + source)
    weight = None
    if row_weights is not None:
        weight = tl.load(row_weights + row, mask=live, other=0.0)
    results = ()
    for number in tl.static_range(OPERANDS):
        results = results + (totals[number] * factor_of_row[None, :],)
    store_results(results, weight, out, row, live, column * STEP, N, SWIGLU, INT4, PARTS, ROWS)


def launch_other_ways(
    a: Tensor, a_scale: Tensor | None, a_row: Tensor | None, w: Tensor, w_scale: Tensor, tiles: list[Tensor],
    row_weights: Tensor | None, out: Tensor, *, block_rows: int, swiglu: bool, rank_one: bool, tile: Tile,
    platform: Platform,
) -> None:  # fmt: skip
    """Fill `out` `(M, N)`, but for rows of no group. Without an `a_scale`, `a` is quantized in the loop."""
    ends, _, tile_expert, tile_row = tiles
    byte_rows, k = (w.shape[2], w.shape[1]) if rank_one else (w.shape[1], w.shape[2])
    step = tile.rows if swiglu else tile.rows * tile.parts
    stride_row, stride_k = (a.stride(1), a.stride(0)) if rank_one else (a.stride(0), a.stride(1))
    launch(
        other_ways_kernel, tile_expert.shape[0] * ceil_div(byte_rows // 2 if swiglu else byte_rows, step),
        a, a_scale, a_row, w.view(torch.int8), w_scale.transpose(1, 2), ends, tile_expert, tile_row, row_weights, out,
        tile_expert.shape[0], out.shape[1], k, byte_rows, stride_row, stride_k,
        QUANTIZE=a_scale is None, RANK_ONE=rank_one, INT4=w.dtype == torch.uint8, SWIGLU=swiglu,
        IN_PTX=platform.in_ptx, PARTS=tile.parts, ROWS=tile.rows, BLOCK_M=block_rows, BLOCK_K=tile.block_k,
        BAND=tile.band, STAGES=tile.stages, **tile.options,
    )  # fmt: skip


def other_product(
    a: Tensor, a_scale: Tensor | None, weight: QuantizedWeight, data: Tensor, tiles: RowTiles, *, swiglu: bool,
    rank_one: bool, a_row: Tensor | None = None, row_weights: Tensor | None = None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """In the tiles that `int8_grouped_mm` would take; where `rank_one` in smaller ones, whose sums fit into registers.
    `data` is that of the weight, K first where `rank_one`."""
    int4, platform = weight.bits == 4, platform_of(a.device)
    num_features = weight.data.shape[2]
    part_rows = weight.data.shape[1] // (2 if swiglu else 1)
    same = GroupedProduct(
        tiles.block_rows, GROUP, 1, int(a_scale is None), num_features, int4, swiglu,
        row_tiles=tiles.expert.shape[0], part_rows=part_rows,
    )  # fmt: skip
    tile = grouped_tile(platform, same, GROUP)
    if a_scale is None:  # floats take more of the shared memory: fewer stages, so that two thread blocks have room too
        stage = (tile.parts * tile.rows + tiles.block_rows * a.element_size()) * GROUP
        tile = replace(tile, stages=max(2, min(tile.stages, platform.shared_bytes // (2 * stage))))
    if rank_one:
        tile = Tile(32, tile.parts, GROUP, warps=4, stages=1)
    num_columns = weight.scale.shape[1] // (2 if swiglu else 1)
    out = torch.empty(tiles.num_rows, num_columns, dtype=dtype, device=a.device)
    launch_other_ways(
        a, a_scale, a_row, data, weight.scale, tiles.tensors, row_weights, out, block_rows=tiles.block_rows,
        swiglu=swiglu, rank_one=rank_one, tile=tile, platform=platform,
    )  # fmt: skip
    return out


def product_in_bands(
    a: Tensor, a_scale: Tensor, weight: QuantizedWeight, tiles: RowTiles, band: int, dtype: torch.dtype
) -> Tensor:
    """`int8_grouped_mm`, with the tiles of rows in bands of this height."""
    platform, num_features = platform_of(a.device), a.shape[1]
    product = GroupedProduct(
        tiles.block_rows, weight.group_size, 1, 0, num_features, weight.bits == 4, swiglu=False,
        row_tiles=tiles.expert.shape[0], part_rows=weight.data.shape[1],
    )  # fmt: skip
    tile = grouped_tile(platform, product)
    out = torch.empty(tiles.num_rows, weight.scale.shape[1], dtype=dtype, device=a.device)
    launch_int8_grouped_mm(
        a, a_scale, None, weight.data, weight.scale, tiles.tensors, None, out, product=product, up_first=False,
        tile=replace(tile, band=band), platform=platform,
    )  # fmt: skip
    return out
