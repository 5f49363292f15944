"""Kernel: wgrad on the tensor cores of Hopper, one scale per 128 tokens of either side (1D1D).

`out[e] (N, K) = sum over 128-token blocks b of expert e: lhs_scale[b, n] * rhs_scale[b, k] * (lhs[:, b] @ rhs[:, b].T)`

Persistent: one thread block a multiprocessor takes tile after tile from a counter. A tile costs as many blocks as its
expert has, so the experts come in descending order of size (`schedule_kernel`): under a skewed routing the cheap tiles
fill the gaps that the costly ones leave.
"""

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fp8moe.gemm.hopper.descriptors import operand_tiles, output_pieces, scale_tiles
from fp8moe.gemm.hopper.ring import (
    BLOCK,
    COLUMN_LAYOUT,
    CONSUMER_REGISTERS,
    CONSUMER_ROWS,
    CONSUMERS,
    PIECE,
    PRODUCER_REGISTERS,
    REGISTERS,
    TILE_COLUMNS,
    TILE_ROWS,
    advance,
    finish,
    load_row_scales,
    make_barriers,
    make_ring,
    multiply_piece,
    piece_pointers,
    store_piece,
    tile_at,
    zero_piece,
)
from fp8moe.gluon_names import aggregate, load_tile
from fp8moe.launch import launch

STAGES = 3  # and output staging of both consumers: 181 KB, for an fp32 output 213 KB
STAGES_WITHOUT_STAGING = 4  # 203 KB
BAND = 8


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
            load_tile(lhs_desc, [row, token], full, ring.lhs.index(stage))
            load_tile(rhs_desc, [column, token], full, ring.rhs.index(stage))
            load_tile(lhs_scale_desc, [token // BLOCK * N + row], full, ring.lhs_scale.index(stage))
            load_tile(rhs_scale_desc, [token // BLOCK * K + column], full, rhs_scale.index(stage))
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
def _load(out, row, column, K):
    """What the products of one piece are added to. Read before them: behind them the sums leave no registers for it."""
    piece = zero_piece()
    if column < K:  # a piece lies inside or outside as a whole
        piece = gl.load(piece_pointers(out, row, column, K)).to(gl.float32)
    return piece


@gluon.jit
def _add(piece, out, row, column, K):
    """Add one piece to fp32 `out`, in memory: nothing is read first, which takes a tenth off the whole product. Each
    element is added to once, so bits repeat. By two neighbours, for which Triton's own atomics have no instruction."""
    if column < K:  # a piece lies inside or outside as a whole
        gl.inline_asm_elementwise(
            "red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0;", "=r,=r,l,l,f,f",
            [piece_pointers(out, row, column, K).to(gl.int64), piece], dtype=gl.int32, is_pure=False, pack=2,
        )  # fmt: skip


@gluon.jit
def _consumer(ring, rhs_scale, inbox, staging, out_desc, out, K, CONSUMER: gl.constexpr, ACCUMULATE: gl.constexpr):
    """Multiplies and sums this consumer's rows of each tile."""
    STAGES: gl.constexpr = ring.full.shape[0]
    if staging is not None:
        staging = staging.index(CONSUMER)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(0)
    product = zero_piece()
    blocks = _next_blocks(inbox, turn)
    while blocks >= 0:
        left, right = zero_piece(), zero_piece()
        if ACCUMULATE and staging is not None:
            row, column = _read(inbox.row, turn) + CONSUMER * CONSUMER_ROWS, _read(inbox.column, turn)
            left = _load(out, row, column, K)
            right = _load(out, row, column + PIECE, K)
        for _ in range(blocks):
            mbarrier.wait(ring.full.index(stage), phase)
            # Scales are loaded once the product is there. Loading them meanwhile is no faster (within 0.5% on an H200:
            # the loads wait for the tensor cores' own reads of shared memory), and holds registers that then spill.
            running = multiply_piece(ring, stage, product, CONSUMER, 0)
            product = finish(running)
            row_scale = load_row_scales(ring, stage, CONSUMER)
            column_scale = rhs_scale.index(stage).slice(0, PIECE).load(COLUMN_LAYOUT)
            left = _promote(left, product, row_scale, column_scale)
            running = multiply_piece(ring, stage, product, CONSUMER, 1)
            product = finish(running)
            column_scale = rhs_scale.index(stage).slice(PIECE, PIECE).load(COLUMN_LAYOUT)
            mbarrier.arrive(ring.empty.index(stage), count=1)
            right = _promote(right, product, row_scale, column_scale)
            stage, phase = advance(stage, phase, STAGES)
        # Where the tile lies is read only now: through the loop it would cost registers.
        row, column = _read(inbox.row, turn) + CONSUMER * CONSUMER_ROWS, _read(inbox.column, turn)
        mbarrier.arrive(inbox.taken.index(turn % 2), count=1)
        if not ACCUMULATE or blocks > 0:
            if staging is None:
                _add(left, out, row, column, K)
                _add(right, out, row, column + PIECE, K)
            else:
                store_piece(left, staging, out_desc, row, column)
                store_piece(right, staging, out_desc, row, column + PIECE)
        turn += 1
        blocks = _next_blocks(inbox, turn)
    if staging is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["E"])
def wgrad_kernel(
    lhs_desc,  # e4m3 (N, R)
    rhs_desc,  # e4m3 (K, R)
    lhs_scale_desc,  # fp32 (R/128 * N,)
    rhs_scale_desc,  # fp32 (R/128 * K,)
    out_desc,  # of `out` as (E * N, K); None where it is added to in memory
    out,  # (E, N, K) contiguous
    padded_ends,  # int32 (E,)
    schedule,  # int32 (1 + E,): the tile counter, then the experts in descending order of size
    N, K, E,
    STAGES: gl.constexpr, BAND: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    ring = make_ring(lhs_desc, rhs_desc, lhs_scale_desc, STAGES)
    rhs_scale = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_COLUMNS], rhs_scale_desc.layout)
    inbox = _make_inbox()
    if out_desc is None:
        staging: gl.constexpr = None
    else:
        staging = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, CONSUMER_ROWS, PIECE], out_desc.layout)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (ring, rhs_scale, inbox, staging, out_desc, out, K, 0, ACCUMULATE)),
            (_consumer, (ring, rhs_scale, inbox, staging, out_desc, out, K, 1, ACCUMULATE)),
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
    *, accumulate: bool, multiprocessors: int,
) -> None:  # fmt: skip
    """Write the products of all experts to `out`, or add them to it.

    Args:
        lhs, rhs: e4m3 `(N, R)` and `(K, R)`, row-major, `R > 0`.
        lhs_scale, rhs_scale: fp32 `(R/128, N)` and `(R/128, K)`, contiguous.
        padded_ends: int32 `(E,)`.
        out: `(E, N, K)` contiguous, bf16, fp16 or fp32.
        accumulate: add to `out` (in fp32, rounded once); an expert without tokens is left as it is, not zeroed.
            To fp32 the sum of the products is added, to bf16 and fp16 the products one after the other.
        multiprocessors: how many thread blocks to launch.
    """
    num_experts, n, k = out.shape
    schedule = padded_ends.new_empty(1 + num_experts)
    adds_in_memory = accumulate and out.dtype == torch.float32
    launch(schedule_kernel, num_experts, padded_ends, schedule, num_experts, EXPERTS=256, num_warps=1)
    launch(
        wgrad_kernel, multiprocessors,
        operand_tiles(lhs, TILE_ROWS.value), operand_tiles(rhs, TILE_COLUMNS.value),
        scale_tiles(lhs_scale, TILE_ROWS.value), scale_tiles(rhs_scale, TILE_COLUMNS.value),
        None if adds_in_memory else output_pieces(out), out, padded_ends, schedule, n, k, num_experts,
        STAGES=STAGES_WITHOUT_STAGING if adds_in_memory else STAGES, BAND=BAND, ACCUMULATE=accumulate,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
