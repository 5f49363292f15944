"""Kernel: forward and dgrad on the tensor cores of Hopper; scales of 1 x 128 rows and 128 x 128 blocks (1D2D).

`out[m] (N,) = sum over 128-blocks b of K: lhs_scale[r, b] * rhs_scale[e, :, b] * (lhs[r, b] @ rhs[e, :, b].T)`, where
padded row r holds ragged row m of expert e. The rows are written ragged: nothing is unpadded afterwards.

Persistent: one thread block a multiprocessor takes every so-many-th tile. All tiles cost the same.
"""

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fp8moe.kernels.launch import launch
from fp8moe.kernels.sm90.descriptors import has_rows_for_tma, operand_tiles, output_pieces, scale_tiles
from fp8moe.kernels.sm90.gluon_names import tma_load
from fp8moe.kernels.sm90.ring import (
    BLOCK,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PIECE_COLUMNS,
    PIECE_ROWS,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROW_LAYOUT,
    TILE_COLUMNS,
    TILE_ROWS,
    advance,
    allocate_staging,
    finish,
    make_ring,
    multiply,
    piece_columns,
    piece_rows,
    store_live,
    store_piece,
    tile_at,
    zero_piece,
)

STAGES = 4  # and output staging of both consumers: 226 KB
BAND = 8


@gluon.jit
def _producer(
    ring, lhs_desc, rhs_desc, lhs_scale_desc, row_expert, padded_ends, R, N, K, E, weight_rows, BAND: gl.constexpr
):  # fmt: skip
    """Copies the operands of each tile a ring ahead of the consumers."""
    STAGES: gl.constexpr = ring.full.shape[0]
    STAGE_BYTES: gl.constexpr = (TILE_ROWS + TILE_COLUMNS) * BLOCK + TILE_ROWS * 4
    tile_rows = gl.load(padded_ends + E - 1) // TILE_ROWS
    tile_columns = gl.cdiv(N, TILE_COLUMNS)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tile_rows * tile_columns, gl.num_programs(0)):
        tile_row, tile_column = tile_at(tile, tile_rows, tile_columns, BAND)
        row, column = tile_row * TILE_ROWS, tile_column * TILE_COLUMNS
        weight_row = gl.load(row_expert + row) * weight_rows + column
        for k in range(0, K, BLOCK):
            mbarrier.wait(ring.empty.index(stage), phase ^ 1)
            full = ring.full.index(stage)
            mbarrier.expect(full, STAGE_BYTES)
            tma_load(lhs_desc, [row, k], full, ring.lhs.index(stage))
            tma_load(rhs_desc, [weight_row, k], full, ring.rhs.index(stage))
            tma_load(lhs_scale_desc, [k // BLOCK * R + row], full, ring.lhs_scale.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _promote(total, product, row_scale):
    """`total + product * row_scale`, in fp32.

    In volatile assembly, or LLVM moves it behind the next product, which then needs a second accumulator: it spills.
    """
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,0", [product, gl.expand_dims(row_scale, 1), total],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _store(total, staging, out_desc, out, row, rows_end, column, N, MASK_COLUMNS: gl.constexpr):
    """Write the rows of one piece that lie before `rows_end`: what follows belongs to the next expert."""
    if out_desc is not None and row + PIECE_ROWS <= rows_end:
        store_piece(total, staging, out_desc, row, column)
    elif column < N:  # without MASK_COLUMNS, a piece lies inside or outside as a whole
        store_live(total, out, row, rows_end, column, N, MASK_COLUMNS)


@gluon.jit
def _zero_rows(out, start, end, step, N):
    """Zeros to every `step`-th row from `start` on."""
    lanes: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    for row in range(start, end, step):
        for column in range(0, N, 1024):
            columns = column + gl.arange(0, 1024, lanes)
            zeros = gl.zeros((1024,), out.dtype.element_ty, lanes)
            gl.store(out + gl.to_tensor(row).to(gl.int64) * N + columns, zeros, mask=columns < N)


@gluon.jit
def _consumer(
    ring, staging, out_desc, out, rhs_scale, row_expert, row_source, ends, padded_ends,
    M, N, K, E, expert_stride, n_stride, k_stride,
    CONSUMER: gl.constexpr, BAND: gl.constexpr, MASK_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Multiplies and sums this consumer's rows of each tile, a piece on the left and one on the right, and zeroes its
    share of the rows of no group."""
    STAGES: gl.constexpr = ring.full.shape[0]
    if out_desc is not None:
        staging = staging.index(CONSUMER)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    product = zero_piece()
    tile_rows = gl.load(padded_ends + E - 1) // TILE_ROWS
    tile_columns = gl.cdiv(N, TILE_COLUMNS)
    for tile in range(gl.program_id(0), tile_rows * tile_columns, gl.num_programs(0)):
        tile_row, tile_column = tile_at(tile, tile_rows, tile_columns, BAND)
        row, column = tile_row * TILE_ROWS, tile_column * TILE_COLUMNS
        expert = gl.load(row_expert + row)
        source = gl.load(row_source + row)
        rows_end = gl.load(ends + expert)
        left_scale = rhs_scale + expert.to(gl.int64) * expert_stride + column // BLOCK * n_stride
        # Past N the right piece is zeros, and is not stored; only its scale must not be read there.
        right_scale = left_scale + gl.where(column + PIECE_COLUMNS < N, n_stride, 0)
        left, right = zero_piece(), zero_piece()
        for _ in range(0, K, BLOCK):
            mbarrier.wait(ring.full.index(stage), phase)
            lhs = piece_rows(ring.lhs, stage, CONSUMER)
            running = multiply(lhs, piece_columns(ring.rhs, stage, 0), product)
            row_scale = piece_rows(ring.lhs_scale, stage, CONSUMER).load(ROW_LAYOUT)
            scaled_left = row_scale * gl.load(left_scale)
            scaled_right = row_scale * gl.load(right_scale)
            product = finish(running)
            left = _promote(left, product, scaled_left)
            running = multiply(lhs, piece_columns(ring.rhs, stage, 1), product)
            product = finish(running)
            mbarrier.arrive(ring.empty.index(stage), count=1)
            right = _promote(right, product, scaled_right)
            left_scale += k_stride
            right_scale += k_stride
            stage, phase = advance(stage, phase, STAGES)
        first = source + CONSUMER * PIECE_ROWS
        _store(left, staging, out_desc, out, first, rows_end, column, N, MASK_COLUMNS)
        _store(right, staging, out_desc, out, first, rows_end, column + PIECE_COLUMNS, N, MASK_COLUMNS)
    if out_desc is not None:
        tma.store_wait(0)
    worker = gl.program_id(0) * CONSUMERS + CONSUMER
    _zero_rows(out, gl.load(ends + E - 1) + worker, M, gl.num_programs(0) * CONSUMERS, N)


@gluon.jit(do_not_specialize=["M", "R", "E", "weight_rows", "expert_stride", "n_stride", "k_stride"])
def m_grouped_kernel(
    lhs_desc,  # e4m3 (R, K)
    rhs_desc,  # e4m3 (E * weight_rows, K)
    lhs_scale_desc,  # fp32 (K/128 * R,)
    out_desc,  # of `out`, or None: then it is written through pointers alone
    out,  # (M, N) contiguous
    rhs_scale,  # fp32 (E, weight_rows/128, K/128), any strides
    row_expert,  # int32 (R,)
    row_source,  # int32 (R,)
    ends,  # int32 (E,)
    padded_ends,  # int32 (E,)
    M, R, N, K, E, weight_rows, expert_stride, n_stride, k_stride,
    STAGES: gl.constexpr, BAND: gl.constexpr, MASK_COLUMNS: gl.constexpr,
):  # fmt: skip
    """MASK_COLUMNS says that N is no multiple of 128."""
    ring = make_ring(lhs_desc, rhs_desc, lhs_scale_desc, STAGES)
    if out_desc is None:
        staging: gl.constexpr = None
    else:
        staging = allocate_staging(out_desc)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (ring, staging, out_desc, out, rhs_scale, row_expert, row_source, ends, padded_ends,
                         M, N, K, E, expert_stride, n_stride, k_stride, 0, BAND, MASK_COLUMNS)),
            (_consumer, (ring, staging, out_desc, out, rhs_scale, row_expert, row_source, ends, padded_ends,
                         M, N, K, E, expert_stride, n_stride, k_stride, 1, BAND, MASK_COLUMNS)),
            (_producer, (ring, lhs_desc, rhs_desc, lhs_scale_desc, row_expert, padded_ends, R, N, K, E, weight_rows,
                         BAND)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_m_grouped(
    lhs: Tensor, lhs_scale: Tensor, rhs: Tensor, rhs_scale: Tensor,
    row_expert: Tensor, row_source: Tensor, ends: Tensor, padded_ends: Tensor, out: Tensor,
    *, multiprocessors: int,
) -> None:  # fmt: skip
    """Write the product of each ragged row with its own expert's weight to `out`, and zeros to rows of no group.

    Args:
        lhs: e4m3 `(R, K)`, row-major, `R > 0`.
        lhs_scale: fp32 `(K/128, R)`, contiguous.
        rhs: e4m3 `(E, N, K)`, contiguous, of whole blocks.
        rhs_scale: fp32 `(E, N/128, K/128)`, any strides.
        row_expert, row_source, ends, padded_ends: as in `TokenGroups`.
        out: `(M, N)` contiguous, bf16, fp16 or fp32; of any number of columns up to `N`, the first ones.
        multiprocessors: how many thread blocks to launch.
    """
    num_experts, weight_rows, k = rhs.shape
    n = out.shape[1]
    launch(
        m_grouped_kernel, multiprocessors,
        operand_tiles(lhs, TILE_ROWS.value), operand_tiles(rhs.view(num_experts * weight_rows, k), TILE_COLUMNS.value),
        scale_tiles(lhs_scale, TILE_ROWS.value),
        # Pieces in fp32 are too large for shared memory beside four stages.
        output_pieces(out) if out.element_size() == 2 and has_rows_for_tma(out) else None,
        out, rhs_scale, row_expert, row_source, ends, padded_ends,
        out.shape[0], lhs.shape[0], n, k, num_experts, weight_rows, *rhs_scale.stride(),
        STAGES=STAGES, BAND=BAND, MASK_COLUMNS=n % PIECE_COLUMNS.value != 0, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
