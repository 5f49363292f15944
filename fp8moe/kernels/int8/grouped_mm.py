"""Kernel: rows of int8, each by the int8 or int4 weight of its own expert; exact sums, scaled a group at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.gated import swiglu
from fp8moe.kernels.int8.platform import MAX_INT32, GroupedProduct, Platform, Tile
from fp8moe.kernels.int8.products import exact_dot, tile_in_bands, unpack_rows
from fp8moe.kernels.launch import ceil_div, launch


@triton.jit
def load_scales(w_scale, features, group, group_stride, feature_stride, INT4: tl.constexpr, OPERANDS: tl.constexpr):
    """fp32, of the features of each operand in one group of K; for int4 a sixteenth, as `unpack_rows` wants it."""
    scales = ()
    for i in tl.static_range(OPERANDS):
        scale = tl.load(w_scale + group * group_stride + features[i] * feature_stride)
        scales = scales + ((scale * 0.0625 if INT4 else scale),)
    return scales


@triton.jit
def rows_of_tile(
    first, end, a_row, BLOCK_M: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr, TIMES: tl.constexpr = 1
):  # fmt: skip
    """The rows in the LANES of a tile, each TIMES in a row; whether each is the tile's and its expert's; and the row of
    `a` that it is (the first where it is not)."""
    lane = tl.arange(0, LANES * TIMES) // TIMES
    row = tl.load(first) + lane
    live = row < tl.load(end)
    if LANES > BLOCK_M:
        live = live & (lane < BLOCK_M)
    if a_row is None:
        source = tl.where(live, row, 0)
    else:
        source = tl.load(a_row + row, mask=live, other=0)
    if WIDE:
        source = source.to(tl.int64)
    return row, live, source


@triton.jit
def store_results(
    results, weight, out, row, live, first, N,
    SWIGLU: tl.constexpr, INT4: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write products, features x rows, each with its number in `results`, to `out` (M, N): parts from byte row `first`
    on, or their activation; times the `weight` of each row, unless that is None."""
    PER_BYTE: tl.constexpr = 2 if INT4 else 1
    for p in tl.static_range(1 if SWIGLU else PARTS):
        columns = ()
        for i in tl.static_range(PER_BYTE):
            if SWIGLU:
                value = swiglu(results[i], results[PER_BYTE + i], ())
            else:
                value = results[p * PER_BYTE + i]
            if weight is not None:
                value = value * weight[None, :]
            columns = columns + (tl.trans(value),)
        tile_out = tl.interleave(columns[0], columns[1]) if INT4 else columns[0]
        feature = (first + p * ROWS) * PER_BYTE + tl.arange(0, ROWS * PER_BYTE)
        inside = live[:, None] & (feature < N)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * N + feature[None, :], tile_out, mask=inside)


@triton.jit
def int8_grouped_mm_kernel(
    a,  # int8 (rows, K), rows of a_stride
    a_scale,  # fp32 (rows,) or (rows, tiles of K)
    a_row,  # int32 (M,): the row of `a` for each row of `out`; or None: the same
    w,  # int8 (E, BYTE_ROWS, K) contiguous: rows, or pairs of rows as int4
    w_scale,  # fp32 (E, N, groups of K)
    ends,  # int32 (E,)
    tile_expert, tile_row,  # int32 (TILES,): the expert of each tile of rows, -1 for none, and its first row
    row_weights,  # (M,) or None
    out,  # (M, N) contiguous
    TILES, N, K, BYTE_ROWS, a_stride, a_scale_stride, expert_stride, group_stride, feature_stride,
    UNIT: tl.constexpr, UNITS_OF_W: tl.constexpr, UNITS_OF_A: tl.constexpr, SINGLE: tl.constexpr,
    MASK_K: tl.constexpr, MASK_N: tl.constexpr, WIDE: tl.constexpr, INT4: tl.constexpr, SWIGLU: tl.constexpr,
    UP_FIRST: tl.constexpr, IN_FP16: tl.constexpr, IN_PTX: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, BAND: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows x the features in PARTS tiles of ROWS byte rows of the weight.

    The weight is the left operand: its features are many where rows are few, and tensor cores have their long side on
    the left. UNIT elements of K have all scales in common: they are summed as integers, in tiles of BLOCK_K of which
    the last is masked. UNITS_OF_W units have one scale of the weight, and UNITS_OF_A one of `a` (0: all have). SINGLE:
    there is one unit. For SwiGLU the two parts are gate and up; otherwise parts are neighbours.

    Where rows are few, the weight is what takes time, and a unit may be too short to read it in. So a tile of BLOCK_K
    may have SLICES units, with one scale of the weight, and each row is multiplied as SLICES rows: each has one of the
    units, and zeros where the others are. In the end they are added up.

    LANES, at least BLOCK_M, times SLICES are as many columns as matrix units take; lanes past BLOCK_M are idle.
    """
    PER_BYTE: tl.constexpr = 2 if INT4 else 1
    OPERANDS: tl.constexpr = PARTS * PER_BYTE
    BLOCKS: tl.constexpr = (UNIT + BLOCK_K - 1) // BLOCK_K  # of a unit
    SPAN: tl.constexpr = UNIT * SLICES
    COLUMNS: tl.constexpr = LANES * SLICES
    STEP: tl.constexpr = ROWS if SWIGLU else PARTS * ROWS
    part_rows = BYTE_ROWS // 2 if SWIGLU else BYTE_ROWS
    tile, column = tile_in_bands(tl.program_id(0), TILES, tl.cdiv(part_rows, STEP), BAND)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    expert = expert.to(tl.int64)
    _, _, source = rows_of_tile(tile_row + tile, ends + expert, a_row, BLOCK_M, LANES, WIDE, SLICES)

    k = tl.arange(0, BLOCK_K)
    own_slice = tl.arange(0, COLUMNS) % SLICES
    a_offsets = (source * a_stride)[None, :] + k[:, None]
    w += expert * BYTE_ROWS * K
    byte_row = column * STEP + tl.arange(0, ROWS)
    w_offsets, features = (), ()
    for p in tl.static_range(PARTS):
        own_row = byte_row + (0 if SWIGLU else p * ROWS)
        if MASK_N:  # rows past the last are the last again, and are not stored: no load of a weight needs a mask
            own_row = tl.minimum(own_row, part_rows - 1)
        if SWIGLU:
            own_row += (1 - p if UP_FIRST else p) * part_rows
        w_offsets = w_offsets + ((own_row * K)[:, None] + k[None, :],)
        for i in tl.static_range(PER_BYTE):
            features = features + (own_row * PER_BYTE + i,)
    w_scale += expert * expert_stride

    totals, parts = (), ()
    for _ in tl.static_range(OPERANDS):
        totals = totals + (tl.zeros((ROWS, COLUMNS), tl.float32),)
        parts = parts + (tl.zeros((ROWS, COLUMNS), tl.int32),)
    last_unit = tl.cdiv(K, UNIT) - 1
    own_scales = a_scale + source * a_scale_stride
    # With stages of its own a loop has all its loads pipelined, those of scales too. A scale that is loaded into
    # registers a step ahead is waited for at the end of that step: it comes from memory, as late as codes do.
    for block in tl.range(tl.cdiv(K, SPAN) * BLOCKS, num_stages=STAGES):
        span = block // BLOCKS * SPAN
        start = span + block % BLOCKS * BLOCK_K
        inside = start + k < tl.minimum(span + SPAN, K)
        # The weight first: where it lies is known before which rows there are.
        w_codes = ()
        for p in tl.static_range(PARTS):
            if MASK_K:
                w_codes = w_codes + (tl.load(w + start + w_offsets[p], mask=inside[None, :], other=0),)
            else:
                w_codes = w_codes + (tl.load(w + start + w_offsets[p]),)
        if not SINGLE:
            unit = block // BLOCKS * SLICES
            w_scales = load_scales(w_scale, features, unit // UNITS_OF_W, group_stride, feature_stride, INT4, OPERANDS)
            if UNITS_OF_A > 0:  # past the last unit are zeros, and the last scale again
                a_scales = tl.load(own_scales + tl.minimum(unit + own_slice, last_unit) // UNITS_OF_A)
        if SLICES > 1:
            mask = inside[:, None] & ((k // UNIT)[:, None] == own_slice[None, :])
            a_codes = tl.load(a + start + a_offsets, mask=mask, other=0)
        elif MASK_K:
            a_codes = tl.load(a + start + a_offsets, mask=inside[:, None], other=0)
        else:
            a_codes = tl.load(a + start + a_offsets)
        new_totals, new_parts = (), ()
        for p in tl.static_range(PARTS):
            operands = unpack_rows(w_codes[p], INT4, IN_PTX)
            for i in tl.static_range(PER_BYTE):
                total, part = totals[p * PER_BYTE + i], parts[p * PER_BYTE + i]
                if BLOCKS == 1:
                    part = tl.zeros((ROWS, COLUMNS), tl.int32)
                part = exact_dot(operands[i], a_codes, part, IN_FP16)
                if not SINGLE:  # noqa: SIM102 (a condition that is known, apart from one that is not)
                    if BLOCKS == 1 or block % BLOCKS == BLOCKS - 1:
                        scale = w_scales[p * PER_BYTE + i][:, None]
                        if UNITS_OF_A > 0:
                            scale = scale * a_scales[None, :]
                        total = tl.fma(part.to(tl.float32), tl.broadcast_to(scale, (ROWS, COLUMNS)), total)
                        part = tl.zeros((ROWS, COLUMNS), tl.int32)
                new_totals = new_totals + (total,)
                new_parts = new_parts + (part,)
        totals, parts = new_totals, new_parts

    # Read again rather than kept: the loop leaves no registers for them.
    row, live, source = rows_of_tile(tile_row + tile, ends + expert, a_row, BLOCK_M, LANES, WIDE)
    factor = tl.full((LANES,), 1.0, tl.float32)
    if UNITS_OF_A == 0:
        factor = tl.load(a_scale + source * a_scale_stride)
    weight = None
    if row_weights is not None:
        weight = tl.load(row_weights + row, mask=live, other=0.0).to(tl.float32)
    if SINGLE:
        w_scales = load_scales(w_scale, features, 0, group_stride, feature_stride, INT4, OPERANDS)
    results = ()
    for number in tl.static_range(OPERANDS):
        total = parts[number].to(tl.float32) * w_scales[number][:, None] if SINGLE else totals[number]
        if SLICES > 1:
            total = tl.sum(tl.reshape(total, (ROWS, LANES, SLICES)), axis=2)
        results = results + (total * factor[None, :],)
    store_results(results, weight, out, row, live, column * STEP, N, SWIGLU, INT4, PARTS, ROWS)


def passes_the_end(num_features: int, unit: int, tile: Tile) -> bool:
    """Whether a tile of `block_k` may hold elements that are not its unit's, or lie past K.

    The last unit has as many tiles as all others, and where K ends within it, whole tiles may lie past K.
    """
    several = unit < num_features and tile.slices == 1
    return num_features % tile.block_k != 0 or (several and (unit % tile.block_k != 0 or num_features % unit != 0))


def launch_int8_grouped_mm(
    a: Tensor, a_scale: Tensor, a_row: Tensor | None, w: Tensor, w_scale: Tensor, tiles: list[Tensor],
    row_weights: Tensor | None, out: Tensor, *, product: GroupedProduct, up_first: bool, tile: Tile,
    platform: Platform,
) -> None:  # fmt: skip
    """Fill `out` `(M, N)`, but for rows of no group. `w` is int8 `(E, N, K)` or uint8 `(E, N / 2, K)`, contiguous."""
    ends, _, tile_expert, tile_row = tiles
    num_features, unit = product.num_features, product.unit
    is_single = unit >= num_features
    part_rows = w.shape[1] // 2 if product.swiglu else w.shape[1]
    step = tile.rows if product.swiglu else tile.rows * tile.parts
    launch(
        int8_grouped_mm_kernel, tile_expert.shape[0] * ceil_div(part_rows, step),
        a, a_scale, a_row, w.view(torch.int8), w_scale, ends, tile_expert, tile_row, row_weights, out,
        tile_expert.shape[0], out.shape[1], num_features, w.shape[1], a.stride(0), a_scale.stride(0),
        w_scale.stride(0), w_scale.stride(2), w_scale.stride(1),
        UNIT=num_features if is_single else unit, UNITS_OF_W=product.units_of_w, UNITS_OF_A=product.units_of_a,
        SINGLE=is_single, MASK_K=passes_the_end(num_features, unit, tile), MASK_N=part_rows % step != 0,
        WIDE=a.shape[0] * a.stride(0) > MAX_INT32, INT4=product.int4, SWIGLU=product.swiglu, UP_FIRST=up_first,
        IN_FP16=product.in_fp16, IN_PTX=platform.in_ptx, PARTS=tile.parts, ROWS=tile.rows, BLOCK_M=product.block_rows,
        LANES=platform.lanes(product.block_rows, tile.slices), BLOCK_K=tile.block_k, SLICES=tile.slices,
        BAND=tile.band, STAGES=tile.stages, **tile.options,
    )  # fmt: skip
