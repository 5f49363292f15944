"""Kernel: wgrad on the tensor cores of Hopper, one scale per 128 tokens of the left side, and of the right per 128, 256
or 512 (1D1D).

`out[e] (N, K) = sum over 128-token blocks b of expert e: lhs_scale[b, n] * rhs_scale[b, k] * (lhs[:, b] @ rhs[:, b].T)`

What costs the most beside the products are the scales of the columns: a thread needs 32 of them for 64 elements. So a
consumer's two pieces lie one below the other and share them. And where tiles of the right side are longer than a block,
sums are carried in units of its scale: only where a tile ends are they multiplied, by its scale over that of the next,
and at the end of the expert by its scale (`scale_steps.py`).

Persistent: one thread block a multiprocessor takes tile after tile from a counter. A tile costs as many blocks as its
expert has, so the experts come in descending order of size (`schedule_kernel`): under a skewed routing the cheap tiles
fill the gaps that the costly ones leave.
"""

import torch.nn.functional as F
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fp8moe.kernels.launch import launch
from fp8moe.kernels.sm90.descriptors import has_rows_for_tma, operand_tiles, output_pieces, scale_tiles
from fp8moe.kernels.sm90.gluon_names import aggregate, tma_load
from fp8moe.kernels.sm90.ring import (
    BLOCK,
    COLUMN_LAYOUT,
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
    make_barriers,
    make_ring,
    multiply,
    piece_columns,
    piece_pointers,
    piece_rows,
    store_live,
    store_piece,
    tile_at,
    zero_piece,
)
from fp8moe.kernels.sm90.scale_steps import launch_scale_steps

STAGES = 3  # and output staging of both consumers: 181 KB, for an fp32 output 213 KB
STAGES_WITHOUT_STAGING = 4  # 203 KB
BAND = 8
VECTOR = 4  # fp32 numbers that TMA reads at least


@aggregate
class Inbox:
    """Tiles on their way from the producer, which draws them, to the consumers: tile number `turn` of this thread block
    lies in slot `turn % 2`."""

    row: gl.shared_memory_descriptor  # int32 (2, 1), like the next two
    column: gl.shared_memory_descriptor
    blocks: gl.shared_memory_descriptor  # how many are summed; negative where there is no further tile
    posted: gl.shared_memory_descriptor
    taken: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, row, column, blocks, posted, taken):
        self.row = row
        self.column = column
        self.blocks = blocks
        self.posted = posted
        self.taken = taken


@gluon.jit
def _make_inbox():
    numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = gl.allocate_shared_memory(gl.int32, [2, 1], numbers)
    column = gl.allocate_shared_memory(gl.int32, [2, 1], numbers)
    blocks = gl.allocate_shared_memory(gl.int32, [2, 1], numbers)
    return Inbox(row, column, blocks, make_barriers(2, 1), make_barriers(2, CONSUMERS))


@gluon.jit
def _post(inbox, turn, row, column, blocks):
    slot = turn % 2
    mbarrier.wait(inbox.taken.index(slot), turn // 2 % 2 ^ 1)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    inbox.row.index(slot).store(gl.full([1], row, gl.int32, one))
    inbox.column.index(slot).store(gl.full([1], column, gl.int32, one))
    inbox.blocks.index(slot).store(gl.full([1], blocks, gl.int32, one))
    mbarrier.arrive(inbox.posted.index(slot), count=1)


@gluon.jit
def _read(numbers, turn):
    return gl.max(numbers.index(turn % 2).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _next_blocks(inbox, turn):
    """Wait for tile number `turn`; how many blocks it sums."""
    mbarrier.wait(inbox.posted.index(turn % 2), turn // 2 % 2)
    return _read(inbox.blocks, turn)


@gluon.jit
def _producer(
    ring, rhs_scale, inbox, lhs_desc, rhs_desc, lhs_scale_desc, rhs_scale_desc, padded_ends, schedule, N, K, E,
    BAND: gl.constexpr,
):  # fmt: skip
    """Draws tiles, posts them to the consumers, and copies their operands a ring ahead."""
    STAGES: gl.constexpr = ring.full.shape[0]
    STAGE_BYTES: gl.constexpr = (TILE_ROWS + TILE_COLUMNS) * (BLOCK + 4)
    tile_rows = gl.cdiv(N, TILE_ROWS)
    tile_columns = gl.cdiv(K, TILE_COLUMNS)
    tiles_per_expert = tile_rows * tile_columns
    # Rows of scales are whole vectors (see `_in_whole_vectors`).
    lhs_scales, rhs_scales = gl.cdiv(N, 4) * 4, gl.cdiv(K, 4) * 4
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = gl.atomic_add(schedule, 1)
    while tile < E * tiles_per_expert:
        following = gl.atomic_add(schedule, 1)  # its latency hides behind this tile
        rank = tile // tiles_per_expert
        expert = gl.load(schedule + 1 + rank)
        start = gl.load(padded_ends + expert - 1, mask=expert > 0, other=0)
        end = gl.load(padded_ends + expert)
        tile_row, tile_column = tile_at(tile - rank * tiles_per_expert, tile_rows, tile_columns, BAND)
        row, column = tile_row * TILE_ROWS, tile_column * TILE_COLUMNS
        _post(inbox, turn, expert * N + row, column, (end - start) // BLOCK)
        for token in range(start, end, BLOCK):
            mbarrier.wait(ring.empty.index(stage), phase ^ 1)
            full = ring.full.index(stage)
            mbarrier.expect(full, STAGE_BYTES)
            tma_load(lhs_desc, [row, token], full, ring.lhs.index(stage))
            tma_load(rhs_desc, [column, token], full, ring.rhs.index(stage))
            tma_load(lhs_scale_desc, [token // BLOCK * lhs_scales + row], full, ring.lhs_scale.index(stage))
            tma_load(rhs_scale_desc, [token // BLOCK * rhs_scales + column], full, rhs_scale.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        tile = following
        turn += 1
    _post(inbox, turn, 0, 0, -1)


@gluon.jit
def _promote(total, product, row_scale, column_scale):
    """`total + product * (row_scale * column_scale)`, in fp32.

    In volatile assembly, or LLVM moves it behind the next product, which then needs a second accumulator: it spills.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .f32 scale; mul.rn.f32 scale, $2, $3; fma.rn.f32 $0, $1, scale, $4; }", "=f,f,f,f,0",
        [product, gl.expand_dims(row_scale, 1), gl.expand_dims(column_scale, 0), total],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _promote_rows(total, product, row_scale):
    """`total + product * row_scale`, likewise."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,0", [product, gl.expand_dims(row_scale, 1), total],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _multiply_columns(total, column_step):
    """`total * column_step`, likewise."""
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,0,f", [total, gl.expand_dims(column_step, 0)],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _store(
    piece, staging, out_desc, out, row, rows_end, column, K, MASK_ROWS: gl.constexpr, MASK_COLUMNS: gl.constexpr
):  # fmt: skip
    """Write one piece; the rows from `rows_end` on belong to the next expert. For TMA, it lies before or behind as a
    whole: to write it in both ways, depending on the piece, would spill."""
    if out_desc is not None:
        if not MASK_ROWS or row < rows_end:
            store_piece(piece, staging, out_desc, row, column)
    elif (row < rows_end) & (column < K):
        store_live(piece, out, row, rows_end, column, K, MASK_COLUMNS)


@gluon.jit
def _add(
    piece, out, row, rows_end, column, K,
    MASK_ROWS: gl.constexpr, MASK_COLUMNS: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Add one piece to fp32 `out`, in memory: nothing is read first, which takes a tenth off the whole product. Each
    element is added to once, so bits repeat. By two neighbours, for which Triton's own atomics have no instruction,
    unless an odd K leaves every other pair unaligned."""
    inside = column < K
    if MASK_ROWS:
        inside = inside & (row < rows_end)
    if inside:
        pointers = piece_pointers(out, row, column, K).to(gl.int64)
        if not MASK_ROWS and not MASK_COLUMNS:  # a piece lies inside or outside as a whole
            gl.inline_asm_elementwise(
                "red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0;", "=r,=r,l,l,f,f",
                [pointers, piece], dtype=gl.int32, is_pure=False, pack=2,
            )  # fmt: skip
        else:
            # A bound for each row, compared with the column: a mask for each element would spill.
            columns = gl.expand_dims(gl.arange(0, PIECE_COLUMNS, COLUMN_LAYOUT), 0)
            rows = gl.arange(0, PIECE_ROWS, ROW_LAYOUT)
            bound = gl.expand_dims(gl.where(row + rows < rows_end, K - column, 0), 1)
            if PAIRS:
                gl.inline_asm_elementwise(
                    "{ .reg .pred inside; setp.lt.s32 inside, $6, $8; "
                    "@inside red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0; }",
                    "=r,=r,l,l,f,f,r,r,r,r", [pointers, piece, columns, bound], dtype=gl.int32, is_pure=False, pack=2,
                )  # fmt: skip
            else:
                gl.inline_asm_elementwise(
                    "{ .reg .pred inside; setp.lt.s32 inside, $3, $4; "
                    "@inside red.relaxed.gpu.global.add.f32 [$1], $2; mov.b32 $0, 0; }",
                    "=r,l,f,r,r", [pointers, piece, columns, bound], dtype=gl.int32, is_pure=False, pack=1,
                )  # fmt: skip


@gluon.jit
def _consumer(
    ring, rhs_scale, inbox, staging, out_desc, out, N, K,
    CONSUMER: gl.constexpr, TILE_BLOCKS: gl.constexpr, ACCUMULATE: gl.constexpr,
    MASK_ROWS: gl.constexpr, MASK_COLUMNS: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Multiplies and sums this consumer's columns of each tile, in a piece above and one below."""
    STAGES: gl.constexpr = ring.full.shape[0]
    if staging is not None:
        staging = staging.index(CONSUMER)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(0)
    product = zero_piece()
    blocks = _next_blocks(inbox, turn)
    while blocks >= 0:
        above, below = zero_piece(), zero_piece()
        for block in range(blocks):
            mbarrier.wait(ring.full.index(stage), phase)
            rhs = piece_columns(ring.rhs, stage, CONSUMER)
            column_scales = piece_columns(rhs_scale, stage, CONSUMER)
            running = multiply(piece_rows(ring.lhs, stage, 0), rhs, product)
            row_scale = piece_rows(ring.lhs_scale, stage, 0).load(ROW_LAYOUT)
            if TILE_BLOCKS == 1:
                column_scale = column_scales.load(COLUMN_LAYOUT)
                product = finish(running)
                above = _promote(above, product, row_scale, column_scale)
            else:
                product = finish(running)
                above = _promote_rows(above, product, row_scale)
            running = multiply(piece_rows(ring.lhs, stage, 1), rhs, product)
            row_scale = piece_rows(ring.lhs_scale, stage, 1).load(ROW_LAYOUT)
            product = finish(running)
            if TILE_BLOCKS == 1:
                mbarrier.arrive(ring.empty.index(stage), count=1)
                below = _promote(below, product, row_scale, column_scale)
            else:
                below = _promote_rows(below, product, row_scale)
                if ((block + 1) % TILE_BLOCKS == 0) | (block + 1 == blocks):
                    column_step = column_scales.load(COLUMN_LAYOUT)
                    above = _multiply_columns(above, column_step)
                    below = _multiply_columns(below, column_step)
                mbarrier.arrive(ring.empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        # Where the tile lies is read only now: through the loop it would cost registers.
        row, column = _read(inbox.row, turn), _read(inbox.column, turn) + CONSUMER * PIECE_COLUMNS
        mbarrier.arrive(inbox.taken.index(turn % 2), count=1)
        rows_end = row // N * N + N if MASK_ROWS else row + TILE_ROWS  # of this expert
        lower_row = row + PIECE_ROWS
        if not ACCUMULATE:
            _store(above, staging, out_desc, out, row, rows_end, column, K, MASK_ROWS, MASK_COLUMNS)
            _store(below, staging, out_desc, out, lower_row, rows_end, column, K, MASK_ROWS, MASK_COLUMNS)
        elif blocks > 0:
            _add(above, out, row, rows_end, column, K, MASK_ROWS, MASK_COLUMNS, PAIRS)
            _add(below, out, lower_row, rows_end, column, K, MASK_ROWS, MASK_COLUMNS, PAIRS)
        turn += 1
        blocks = _next_blocks(inbox, turn)
    if staging is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["E"])
def wgrad_kernel(
    lhs_desc,  # e4m3 (N, R)
    rhs_desc,  # e4m3 (K, R)
    lhs_scale_desc,  # fp32 (R/128 * N,), N in whole vectors of four
    rhs_scale_desc,  # fp32 (R/128 * K,), likewise: of tiles of TILE_BLOCKS > 1 blocks the steps
    out_desc,  # of `out` as (E * N, K); None where it is added to in memory, or written through pointers
    out,  # (E, N, K) contiguous
    padded_ends,  # int32 (E,)
    schedule,  # int32 (1 + E,): the tile counter, then the experts in descending order of size
    N, K, E,
    STAGES: gl.constexpr, BAND: gl.constexpr, TILE_BLOCKS: gl.constexpr, ACCUMULATE: gl.constexpr,
    MASK_ROWS: gl.constexpr, MASK_COLUMNS: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """The masks say that N or K is no multiple of 128, PAIRS that K is even.

    Operands are zeros past N and K. The scales there are those of the next block of tokens: each element has the scales
    of its own row and column, so what they make of the zeros is not stored.
    """
    ring = make_ring(lhs_desc, rhs_desc, lhs_scale_desc, STAGES)
    rhs_scale = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_COLUMNS], rhs_scale_desc.layout)
    inbox = _make_inbox()
    if out_desc is None:
        staging: gl.constexpr = None
    else:
        staging = allocate_staging(out_desc)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (ring, rhs_scale, inbox, staging, out_desc, out, N, K, 0, TILE_BLOCKS,
                         ACCUMULATE, MASK_ROWS, MASK_COLUMNS, PAIRS)),
            (_consumer, (ring, rhs_scale, inbox, staging, out_desc, out, N, K, 1, TILE_BLOCKS,
                         ACCUMULATE, MASK_ROWS, MASK_COLUMNS, PAIRS)),
            (_producer, (ring, rhs_scale, inbox, lhs_desc, rhs_desc, lhs_scale_desc, rhs_scale_desc,
                         padded_ends, schedule, N, K, E, BAND)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@triton.jit
def schedule_kernel(
    padded_ends,  # int32 (E,)
    schedule,  # int32 (1 + E,)
    E,
    EXPERTS: tl.constexpr,
):
    """Program e writes expert e to its rank among the sizes, descending; equal sizes in their order."""
    expert = tl.program_id(0)
    size = tl.load(padded_ends + expert) - tl.load(padded_ends + expert - 1, mask=expert > 0, other=0)
    rank = 0
    for start in range(0, E, EXPERTS):
        others = start + tl.arange(0, EXPERTS)
        inside = others < E
        ends = tl.load(padded_ends + others, mask=inside, other=0)
        sizes = ends - tl.load(padded_ends + others - 1, mask=inside & (others > 0), other=0)
        before = (sizes > size) | ((sizes == size) & (others < expert))
        rank += tl.sum((before & inside).to(tl.int32), 0)
    tl.store(schedule + 1 + rank, expert)
    tl.store(schedule, 0, mask=expert == 0)


def launch_wgrad(
    lhs: Tensor, rhs: Tensor, lhs_scale: Tensor, rhs_scale: Tensor, padded_ends: Tensor, out: Tensor,
    *, accumulate: bool, multiprocessors: int, rhs_token_tile: int = BLOCK.value,
) -> None:  # fmt: skip
    """Write the products of all experts to `out`, or add them to it.

    Args:
        lhs, rhs: e4m3 `(N, R)` and `(K, R)`, row-major, `R > 0`, `N` and `K` any size.
        lhs_scale, rhs_scale: fp32 `(R/128, N)` and `(R/128, K)`, contiguous.
        padded_ends: int32 `(E,)`.
        out: `(E, N, K)` contiguous, bf16, fp16 or fp32.
        accumulate: add to `out`, which is fp32 and starts at a multiple of 16 bytes; an expert without tokens is left
            as it is, not zeroed.
        multiprocessors: how many thread blocks to launch.
        rhs_token_tile: tokens that share a scale in `rhs`: 128, 256 or 512, from the first of each expert on.
    """
    num_experts, n, k = out.shape
    schedule = padded_ends.new_empty(1 + num_experts)
    tile_blocks = rhs_token_tile // BLOCK.value
    if tile_blocks > 1:
        rhs_scale = launch_scale_steps(rhs_scale, padded_ends)
    launch(schedule_kernel, num_experts, padded_ends, schedule, num_experts, EXPERTS=256, num_warps=1)
    by_tma = not accumulate and has_rows_for_tma(out) and n % PIECE_ROWS.value == 0
    launch(
        wgrad_kernel, multiprocessors,
        operand_tiles(lhs, TILE_ROWS.value), operand_tiles(rhs, TILE_COLUMNS.value),
        scale_tiles(_in_whole_vectors(lhs_scale), TILE_ROWS.value),
        scale_tiles(_in_whole_vectors(rhs_scale), TILE_COLUMNS.value),
        output_pieces(out) if by_tma else None, out, padded_ends, schedule, n, k, num_experts,
        STAGES=STAGES if by_tma else STAGES_WITHOUT_STAGING, BAND=BAND, TILE_BLOCKS=tile_blocks, ACCUMULATE=accumulate,
        MASK_ROWS=n % TILE_ROWS.value != 0, MASK_COLUMNS=k % PIECE_COLUMNS.value != 0, PAIRS=k % 2 == 0,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def _in_whole_vectors(scale: Tensor) -> Tensor:
    """fp32 `(R/128, D)`, with features added until each row is whole vectors of 16 bytes: TMA reads from no other
    place on."""
    missing = -scale.shape[1] % VECTOR
    return F.pad(scale, (0, missing)) if missing else scale
