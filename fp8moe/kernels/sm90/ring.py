"""What both GEMMs share: the ring of operand stages between a producer and its consumers, and the steps of one block.

A thread block is one producer warp, which copies operands to shared memory, and two consumer warpgroups, which
multiply. Each consumer owns half of the tile, in two pieces of `PIECE_ROWS` x `PIECE_COLUMNS`: the fp32 sums of both
and the tensor cores' accumulator of one fill its registers (128 + 64 of 240).
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fp8moe.kernels.sm90.gluon_names import aggregate, tma_store

BLOCK = gl.constexpr(128)  # contraction covered by one scale, and by one stage
TILE_ROWS = gl.constexpr(128)
TILE_COLUMNS = gl.constexpr(256)
CONSUMERS = gl.constexpr(2)
PIECE_ROWS = gl.constexpr(64)
PIECE_COLUMNS = gl.constexpr(128)

# A multiprocessor has 65536: 168 for each thread of 12 warps at launch, then the producer's go to the consumers.
REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

# A warpgroup's accumulator of one piece: warp w holds rows 16 w to 16 w + 15.
PIECE_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
ROW_LAYOUT = gl.constexpr(gl.SliceLayout(1, PIECE_LAYOUT.value))
COLUMN_LAYOUT = gl.constexpr(gl.SliceLayout(0, PIECE_LAYOUT.value))


@aggregate
class Ring:
    """Stages of operands in shared memory. `full` completes when a stage has been copied, `empty` when all consumers
    have read it."""

    lhs: gl.shared_memory_descriptor  # e4m3 (stages, TILE_ROWS, BLOCK)
    rhs: gl.shared_memory_descriptor  # e4m3 (stages, TILE_COLUMNS, BLOCK)
    lhs_scale: gl.shared_memory_descriptor  # fp32 (stages, TILE_ROWS)
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, lhs, rhs, lhs_scale, full, empty):
        self.lhs = lhs
        self.rhs = rhs
        self.lhs_scale = lhs_scale
        self.full = full
        self.empty = empty


@gluon.jit
def make_ring(lhs_desc, rhs_desc, lhs_scale_desc, STAGES: gl.constexpr):
    """An empty ring."""
    lhs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_ROWS, BLOCK], lhs_desc.layout)
    rhs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_COLUMNS, BLOCK], rhs_desc.layout)
    lhs_scale = gl.allocate_shared_memory(gl.float32, [STAGES, TILE_ROWS], lhs_scale_desc.layout)
    return Ring(lhs, rhs, lhs_scale, make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS))


@gluon.jit
def make_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """One mbarrier a stage, each completed by that many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=ARRIVALS)
    return barriers


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage, and its phase: 0 in the first round of the ring, then alternating."""
    stage += 1
    around = stage == STAGES
    return gl.where(around, 0, stage), gl.where(around, phase ^ 1, phase)


@gluon.jit
def tile_at(index, rows, columns, GROUP: gl.constexpr):
    """Row and column of a tile of a `rows` x `columns` grid, walked in bands of GROUP rows, down before right: the
    thread blocks at work at one time share operands in L2."""
    band_size = GROUP * columns
    band = index // band_size
    first = band * GROUP
    height = min(rows - first, GROUP)
    within = index - band * band_size
    column = within // height
    return first + within - column * height, column


@gluon.jit
def piece_rows(stages, stage, NUMBER: gl.constexpr):
    """The `NUMBER`-th `PIECE_ROWS` rows of a stage."""
    return stages.index(stage).slice(NUMBER * PIECE_ROWS, PIECE_ROWS)


@gluon.jit
def piece_columns(stages, stage, NUMBER: gl.constexpr):
    """The `NUMBER`-th `PIECE_COLUMNS` columns of a stage: rows of the right operand."""
    return stages.index(stage).slice(NUMBER * PIECE_COLUMNS, PIECE_COLUMNS)


@gluon.jit
def multiply(lhs, rhs, accumulator):
    """Start the product of e4m3 (PIECE_ROWS, BLOCK) and (PIECE_COLUMNS, BLOCK); the accumulator's values are
    overwritten.

    It is passed in all the same: a zeroed one would cost a second set of registers.
    """
    return warpgroup_mma(lhs, rhs.permute((1, 0)), accumulator, use_acc=False, is_async=True)


@gluon.jit
def finish(product):
    """Wait for a product; the accumulator."""
    return warpgroup_mma_wait(0, (product,))


@gluon.jit
def zero_piece():
    """fp32 zeros (PIECE_ROWS, PIECE_COLUMNS)."""
    return gl.zeros((PIECE_ROWS, PIECE_COLUMNS), gl.float32, PIECE_LAYOUT)


@gluon.jit
def allocate_staging(out_desc):
    """Shared memory through which each consumer's pieces leave."""
    return gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, PIECE_ROWS, PIECE_COLUMNS], out_desc.layout)


@gluon.jit
def store_piece(piece, staging, out_desc, row, column):
    """Write one piece through shared memory; TMA clips what lies outside the tensor."""
    tma.store_wait(0)  # the previous piece has left the buffer
    staging.store(piece.to(staging.dtype))
    fence_async_shared()
    tma_store(out_desc, [row, column], staging)


@gluon.jit
def piece_pointers(out, row, column, stride):
    """Pointers to the elements of one piece of a row-major matrix."""
    origin = out + gl.to_tensor(row).to(gl.int64) * stride + column
    rows = gl.arange(0, PIECE_ROWS, ROW_LAYOUT)
    columns = gl.arange(0, PIECE_COLUMNS, COLUMN_LAYOUT)
    return origin + gl.expand_dims(rows * stride, 1) + gl.expand_dims(columns, 0)


@gluon.jit
def live_elements(row, rows_end, column, columns_end, MASK_COLUMNS: gl.constexpr):
    """Which elements of one piece lie before `rows_end`, and with MASK_COLUMNS before `columns_end`."""
    live = row + gl.expand_dims(gl.arange(0, PIECE_ROWS, ROW_LAYOUT), 1) < rows_end
    if MASK_COLUMNS:
        live = live & (column + gl.expand_dims(gl.arange(0, PIECE_COLUMNS, COLUMN_LAYOUT), 0) < columns_end)
    return live


@gluon.jit
def store_live(piece, out, row, rows_end, column, N, MASK_COLUMNS: gl.constexpr):
    """Write the elements of one piece that lie inside through pointers to `out`, row-major, N columns."""
    live = live_elements(row, rows_end, column, N, MASK_COLUMNS)
    gl.store(piece_pointers(out, row, column, N), piece.to(out.dtype.element_ty), mask=live)
