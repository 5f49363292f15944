"""Kernel: what `swiglu_backward.py` does where all three operands are made, with layouts chosen by hand (Gluon), for
Hopper. Inputs of two bytes an element only.

The Triton kernel goes over its tile twice and computes everything twice, because in the layouts that Triton chooses no
whole tile fits in the registers. Here a thread holds 16 tokens of 4 features of both gradients, and that serves both
ways: the maximum and the codes of a token tile stay within a warp, and vectors of 16 codes are stored from registers;
of a row each thread has the maximum of its 4 features, and shared memory brings together those of 32 threads. What has
no room in the registers, the activation, waits in shared memory.

This takes all registers of a multiprocessor for one tile, so no second thread block hides what the first one waits for.
Instead one block a multiprocessor does tile after tile, and copies the inputs of the next in the background as soon as
it has those of this one in registers, before it computes anything. On an H200 (rows 32768, I 2048; rows 65536, I 768)
it took 239 and 185 us, 0.72 and 0.70 of the copy rate, the Triton kernel 399 and 310, with 61 instructions an element,
of which 57 are left since addresses are computed where they are used; twice the warps with half the registers took 333
and 252 us.

ptxas fills the registers to the last. Where an output is left out, or a computation moves, it may spill: so the Triton
kernel takes what makes fewer operands (`quantize/swiglu_backward.py` chooses), and biases (`has_twin`). It also
makes other gates than SwiGLU. Of features that are interleaved or padded, and of gate and up that are stored quantized,
a few rare variants keep 8 to 40 bytes of loop invariants on the stack: those without a gradient of row weights, of
`TokenLayout.PER_EXPERT`, or of scales that are powers of two.

Gate and up may come as codes with scales (FP8 storage). Shared memory takes them as they are, in half the space, and a
thread turns them into the bf16 that it would have read: 7 instructions more an element, and 2 of 6 bytes less to read.
"""

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from fp8moe.gate import GatedActivation
from fp8moe.kernels import gated, numerics
from fp8moe.kernels.launch import launch
from fp8moe.kernels.sm90.activations import (
    dequantization_scale,
    encode_e4m3,
    long_tile_scaling,
    quantization_factor,
    write_token_codes,
)
from fp8moe.kernels.sm90.gated import GATES
from fp8moe.kernels.sm90.gluon_names import cp_async_load
from fp8moe.kernels.swiglu_backward import count_tiles, kernel_arguments
from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand

# The same source, compiled for tensors whose layouts are explicit.
live_of = gluon.jit(gated.live_of.fn)
load_live = gluon.jit(gated.load_live.fn)
store_live = gluon.jit(gated.store_live.fn)

BY_TOKENS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [4, 0], [8, 0], [0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [16, 0], [32, 0], [64, 0]],
        warp_bases=[[0, 16], [0, 32], [0, 64]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""A tile (128 rows, 128 features): 16 x 4 elements a thread, tokens in neighbouring registers, a column in one warp."""
BY_FEATURES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [16, 0], [32, 0], [64, 0]],
        warp_bases=[[0, 16], [0, 32], [0, 64]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""The same elements a thread, features in neighbouring registers: one conversion makes the codes of two features."""
HALF_A_ROW = gl.constexpr(gl.BlockedLayout([1, 2], [16, 2], [8, 1], [1, 0]))
"""What the 32 threads that share a row have of it, (128, 32), gathered in two."""
COPIED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [0, 64]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [16, 0], [32, 0]],
        warp_bases=[[4, 0], [8, 0], [64, 0]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""A tile as it is copied to shared memory, in vectors of 16 bytes: four rows a warp, and four neighbouring rows a
thread, whose addresses take few registers."""
COPIED_CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], [2, 0]],
        lane_bases=[[0, 16], [0, 32], [0, 64], [16, 0], [32, 0]],
        warp_bases=[[4, 0], [8, 0], [64, 0]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""The same for codes."""
STORED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0]))
"""A tile of codes as it is stored by rows, in vectors of 16 bytes."""
ONE_A_THREAD = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
"""The scales of a tile of codes as they are copied to shared memory."""
IN_ORDER = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
STAGED = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
        + [[1, 0], [2, 0], [4, 0], [8, 8], [16, 16], [32, 32], [64, 64]]
    )
)
"""An input in shared memory, by rows: the order of the vectors differs between rows that a warp reads at a time."""
STAGED_CODES = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
        + [[1, 0], [2, 0], [4, 0], [8, 0], [16, 16], [32, 32], [64, 64]]
    )
)
"""The same for codes, of which a row is half as long."""
STASHED = gl.constexpr(
    gl.SharedLinearLayout(
        [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0]]
        + [[0, 1], [0, 2], [4, 4], [8, 8], [0, 16], [0, 32], [0, 64]]
    )
)
"""The activation in shared memory, by features: likewise between the features of neighbouring threads."""


@gluon.jit
def load_block(numbers, row_block, CAPACITY, LAYOUT: gl.constexpr):
    """The `numbers` (int32) of the 128 padded rows of a block; -1 where no such block is."""
    row = row_block * 128 + gl.arange(0, 128, LAYOUT)
    return gl.load(numbers + row, mask=row < CAPACITY, other=-1)


@gluon.jit
def load_expert(row_expert, row_block, CAPACITY):
    """The expert of a block, -1 where it has none, or where no such block is."""
    # Groups are padded to 128 rows: a live block's first row is live.
    return gl.load(row_expert + row_block * 128, mask=row_block * 128 < CAPACITY, other=-1)


@gluon.jit
def load_row_weights(row_weights, row):
    """fp32, zeros on padding (-1)."""
    return gl.load(row_weights + row, mask=row >= 0, other=0.0).to(gl.float32)


@gluon.jit
def start_copy(staged, x, source, feature_start, stride):
    """Begin to copy 128 rows x 128 features to shared memory; the hardware fills with zeros where a row is -1."""
    feature = feature_start + gl.arange(0, 128, gl.SliceLayout(0, COPIED))
    offsets = gl.expand_dims(source.to(gl.int64) * stride, 1) + gl.expand_dims(feature.to(gl.int64), 0)
    cp_async_load(staged, x + offsets, mask=gl.expand_dims(source >= 0, 1))


@gluon.jit
def start_copy_of_codes(staged, staged_scale, row_data, row_scale, row_block, feature_start, stride, CAPACITY):
    """Begin to copy a tile of a row operand and its 128 scales; zeros where no such block is."""
    row_start = row_block * 128
    row = gl.arange(0, 128, gl.SliceLayout(1, COPIED_CODES))
    feature = gl.arange(0, 128, gl.SliceLayout(0, COPIED_CODES))
    codes = row_data + (row_start.to(gl.int64) * stride + feature_start)
    offsets = gl.expand_dims(row * stride, 1) + gl.expand_dims(feature, 0)
    cp_async_load(staged, codes + offsets, mask=gl.expand_dims(row_start + row < CAPACITY, 1))
    row = gl.arange(0, 128, ONE_A_THREAD)
    scales = row_scale + ((feature_start // 128).to(gl.int64) * CAPACITY + row_start)
    cp_async_load(staged_scale, scales + row, mask=row_start + row < CAPACITY)


@gluon.jit
def start_copies(
    gate_tile, up_tile, d_act_tile, gate_scale, up_scale, x, x_scale, d_act, source, row_block, feature_start,
    NUM_FEATURES, CAPACITY, stride_x, stride_d_act,
):  # fmt: skip
    """Begin to copy the inputs of a tile, as one group."""
    if x_scale is None:
        start_copy(gate_tile, x, source, feature_start, stride_x)
        start_copy(up_tile, x + NUM_FEATURES, source, feature_start, stride_x)
    else:
        start_copy_of_codes(gate_tile, gate_scale, x, x_scale, row_block, feature_start, stride_x, CAPACITY)
        up_start = NUM_FEATURES + feature_start
        start_copy_of_codes(up_tile, up_scale, x, x_scale, row_block, up_start, stride_x, CAPACITY)
    start_copy(d_act_tile, d_act, source, feature_start, stride_d_act)
    async_copy.commit_group()


@gluon.jit
def to_bf16(x):
    """Two elements an instruction; left alone, the compiler converts one at a time, in eight times as long."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def fresh(number):
    """The same int32, of which the compiler computes nothing before the loop: what it has there stays in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_staged(staged, staged_scale):
    """A tile in shared memory, `BY_TOKENS`; codes become bf16."""
    if staged_scale is None:
        tile = staged.load(BY_TOKENS)
    else:
        codes = staged.load(BY_FEATURES)  # in vectors, which then need not be taken apart
        scale = staged_scale.load(gl.SliceLayout(1, BY_FEATURES))
        values = to_bf16(codes.to(gl.float32) * gl.expand_dims(scale, 1))
        tile = gl.convert_layout(values, BY_TOKENS, assert_trivial=True)
    return tile


@gluon.jit
def sum_features(tile):
    """fp32 (128,): the sum of each row of a tile that lies `BY_TOKENS`."""
    return gl.sum(gl.convert_layout(gl.sum(tile.reshape((128, 32, 4)), 2), HALF_A_ROW), 1)


@gluon.jit
def load_tile_amax(tile_amax, row_block, feature_start, NUM_FEATURES, LIVE):
    """fp32 (128,): the maxima of the long token tiles that a block lies in, as `store_tokens_of_tile` wants them."""
    feature = feature_start + gl.arange(0, 128, gl.SliceLayout(0, BY_TOKENS))
    return load_live(tile_amax + row_block.to(gl.int64) * live_of(NUM_FEATURES, LIVE), feature, feature, LIVE)


@gluon.jit
def rows_of_parameter(feature_start, HALF: gl.constexpr, NUM_FEATURES, LIVE, INTERLEAVED: gl.constexpr):
    """int32 (128,): where a parameter holds the features of the gate (`HALF` 0) or of up (1) from this one on."""
    feature = gl.arange(0, 128, gl.SliceLayout(0, BY_TOKENS))
    if INTERLEAVED:
        rows = (feature_start + feature) * 2 + HALF
    elif HALF == 1:
        rows = live_of(NUM_FEATURES, LIVE) + feature_start + feature
    else:
        rows = feature_start + feature
    return rows


@gluon.jit
def store_tokens_of_tile(
    tile, tile_amax, token_data, token_scale, group_start, group_end, row_block, feature_start,
    HALF: gl.constexpr, HALVES: gl.constexpr, NUM_FEATURES, LIVE, CAPACITY,
    INTERLEAVED: gl.constexpr, PER_EXPERT: gl.constexpr, POW2: gl.constexpr,
):  # fmt: skip
    """Quantize `tile`, which lies `BY_TOKENS`, along its tokens, into a token operand: as a tile, or, where the maxima
    `tile_amax` are given, as part of a long one. It is the half number `HALF` of the `HALVES` of the operand."""
    amax = gl.reduce(gl.abs(tile), 0, numerics.maximum) if tile_amax is None else tile_amax
    scale = dequantization_scale(amax, POW2)
    factor = quantization_factor(amax, scale, POW2)
    if tile_amax is not None:
        scale, factor = long_tile_scaling(amax, scale, factor)
    codes = encode_e4m3(tile, gl.expand_dims(factor, 0))
    width = HALVES * live_of(NUM_FEATURES, LIVE)
    if LIVE is None and not INTERLEAVED:
        write_token_codes(
            codes, token_data, group_start, group_end, row_block * 128, HALF * NUM_FEATURES + feature_start, width,
            CAPACITY, PER_EXPERT,
        )  # fmt: skip
    else:
        row_length, start = CAPACITY, (row_block * 128).to(gl.int64)
        if PER_EXPERT:
            row_length = group_end - group_start
            start = group_start.to(gl.int64) * width + (row_block * 128 - group_start)
        row = rows_of_parameter(feature_start, HALF, NUM_FEATURES, LIVE, INTERLEAVED)
        token = gl.arange(0, 128, gl.SliceLayout(1, BY_TOKENS))
        offsets = gl.expand_dims(row.to(gl.int64) * row_length, 0) + gl.expand_dims(token, 1)
        feature = feature_start + gl.arange(0, 128, gl.SliceLayout(0, BY_TOKENS))
        store_live(token_data + start, gl.expand_dims(feature, 0), offsets, codes, LIVE)
    feature = feature_start + gl.arange(0, 128, gl.SliceLayout(0, BY_TOKENS))
    row = rows_of_parameter(feature_start, HALF, NUM_FEATURES, LIVE, INTERLEAVED)
    store_live(token_scale + row_block.to(gl.int64) * width, feature, row, scale, LIVE)


@gluon.jit
def store_rows_of_tile(
    tile, row_data, row_scale, row_block, feature_start, NUM_FEATURES, CAPACITY, POW2: gl.constexpr
):  # fmt: skip
    """Quantize `tile`, which lies `BY_TOKENS`, along its features, into a row operand."""
    tile = gl.convert_layout(tile, BY_FEATURES, assert_trivial=True)
    row_start = row_block.to(gl.int64) * 128
    partial = gl.reduce(gl.abs(tile).reshape((128, 32, 4)), 2, numerics.maximum)
    amax = gl.reduce(gl.convert_layout(partial, HALF_A_ROW), 1, numerics.maximum)
    scale = dequantization_scale(amax, POW2)
    row = gl.arange(0, 128, gl.SliceLayout(1, HALF_A_ROW))
    gl.store(row_scale + (feature_start // 128).to(gl.int64) * CAPACITY + row_start + row, scale)
    factor = gl.convert_layout(quantization_factor(amax, scale, POW2), gl.SliceLayout(1, BY_FEATURES))
    codes = gl.convert_layout(encode_e4m3(tile, gl.expand_dims(factor, 1)), STORED)
    row = gl.arange(0, 128, gl.SliceLayout(1, STORED))
    feature = feature_start + gl.arange(0, 128, gl.SliceLayout(0, STORED))
    offsets = gl.expand_dims(row * NUM_FEATURES, 1) + gl.expand_dims(feature, 0)
    gl.store(row_data + row_start * NUM_FEATURES + offsets, codes)


@gluon.jit
def quantize_swiglu_backward_hopper_kernel(
    d_act,  # (rows, NUM_FEATURES) bf16 or fp16, features contiguous, rows of whole vectors of 16 bytes
    x,  # (rows, 2 * NUM_FEATURES), the same: gate, then up
    x_scale,  # None; or x is e4m3 (CAPACITY, 2 * NUM_FEATURES), and this fp32 stored (NUM_FEATURES / 64, CAPACITY)
    row_weights,  # (rows,) any float dtype, or None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # of d_x: e4m3 (CAPACITY, 2 * NUM_FEATURES); fp32 stored (NUM_FEATURES / 64, CAPACITY)
    token_data, token_scale,  # of d_x: e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, 2 * LIVE)
    act_data, act_scale,  # of the activation: e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, LIVE)
    act_amax,  # None, or of the activation's long token tiles fp32 (CAPACITY / 128, LIVE), see LongTiles
    weight_parts,  # None, or fp32 (NUM_FEATURES / 128, NUM_ROWS): the row weights' gradients, in parts
    stride_d_act, stride_x, NUM_FEATURES, LIVE, CAPACITY, NUM_ROWS,  # LIVE: None where all features are live
    PER_EXPERT: gl.constexpr, POW2: gl.constexpr, PARAMETERS: gl.constexpr, INTERLEAVED: gl.constexpr,
    GATE: gl.constexpr,
):  # fmt: skip
    """A program does 128 padded rows x 128 features of each half, tile after tile."""
    to_copy: gl.constexpr = gl.SliceLayout(1, COPIED)
    to_sum: gl.constexpr = gl.SliceLayout(1, HALF_A_ROW)
    staged_x: gl.constexpr = STAGED if x_scale is None else STAGED_CODES
    gate_tile = gl.allocate_shared_memory(x.dtype.element_ty, [128, 128], staged_x)
    up_tile = gl.allocate_shared_memory(x.dtype.element_ty, [128, 128], staged_x)
    gate_scale = None
    up_scale = None
    if x_scale is not None:
        gate_scale = gl.allocate_shared_memory(gl.float32, [128], IN_ORDER)
        up_scale = gl.allocate_shared_memory(gl.float32, [128], IN_ORDER)
    d_act_tile = gl.allocate_shared_memory(d_act.dtype.element_ty, [128, 128], STAGED)
    stash = gl.allocate_shared_memory(gl.float32, [128, 128], STASHED)
    feature_blocks = NUM_FEATURES // 128
    programs = gl.num_programs(0)

    row_block, feature_start = gl.program_id(0) // feature_blocks, gl.program_id(0) % feature_blocks * 128
    source = load_block(row_source, row_block, CAPACITY, to_copy)
    start_copies(
        gate_tile, up_tile, d_act_tile, gate_scale, up_scale, x, x_scale, d_act, source, row_block, feature_start,
        NUM_FEATURES, CAPACITY, stride_x, stride_d_act,
    )  # fmt: skip
    row = load_block(row_source, row_block, CAPACITY, to_sum)
    if row_weights is not None:
        row_weight = load_row_weights(row_weights, row)
    expert = load_expert(row_expert, row_block, CAPACITY)
    # Of the next tile:
    row_block = (gl.program_id(0) + programs) // feature_blocks
    source = load_block(row_source, row_block, CAPACITY, to_copy)
    next_row = load_block(row_source, row_block, CAPACITY, to_sum)
    next_expert = load_expert(row_expert, row_block, CAPACITY)

    for tile in range(gl.program_id(0), CAPACITY // 128 * feature_blocks, programs):
        row_block, feature_start = tile // feature_blocks, tile % feature_blocks * 128
        width, capacity = fresh(feature_blocks) * 256, fresh(CAPACITY // 128) * 128
        live = None
        if LIVE is not None:
            live = fresh(LIVE)
        if row_weights is not None:
            weight = gl.expand_dims(gl.convert_layout(row_weight, gl.SliceLayout(1, BY_TOKENS)), 1)
        else:
            weight = gl.full([128, 1], 1.0, gl.float32, BY_TOKENS)
        async_copy.wait_group(0)
        gate = load_staged(gate_tile, gate_scale)
        up = load_staged(up_tile, up_scale)
        gradient = d_act_tile.load(BY_TOKENS)

        next_block, next_start = (tile + programs) // feature_blocks, (tile + programs) % feature_blocks * 128
        start_copies(
            gate_tile, up_tile, d_act_tile, gate_scale, up_scale, x, x_scale, d_act, source, next_block, next_start,
            NUM_FEATURES, capacity, stride_x if x_scale is None else width, fresh(stride_d_act // 16) * 16,
        )  # fmt: skip
        later_block = (tile + 2 * programs) // feature_blocks
        source = load_block(row_source, later_block, CAPACITY, to_copy)
        if row_weights is not None:
            next_weight = load_row_weights(row_weights, next_row)

        if expert >= 0:  # the blocks without an expert are the last; a loop that ends there spills
            # The compiler cannot see that loaded ends are aligned; told so, it stores whole vectors.
            group_start = gl.multiple_of(gl.load(padded_ends + expert - 1, mask=expert > 0, other=0), 128)
            group_end = gl.multiple_of(gl.load(padded_ends + expert), 128)
            act, d_gate, d_up, terms = GATE(
                gate, up, gradient,
                gl.convert_layout(weight.broadcast_to(128, 128), BY_TOKENS, assert_trivial=True), PARAMETERS,
            )  # fmt: skip
            stash.store(act)
            if weight_parts is not None:
                sums = sum_features(terms)
                gl.store(weight_parts + (feature_start // 128).to(gl.int64) * NUM_ROWS + row, sums, mask=row >= 0)
            store_tokens_of_tile(
                d_up, None, token_data, token_scale, group_start, group_end, row_block, feature_start,
                1, 2, NUM_FEATURES, live, capacity, INTERLEAVED, PER_EXPERT, POW2,
            )  # fmt: skip
            tile_amax = None
            if act_amax is not None:  # long before it is needed: no other thread block hides this latency
                tile_amax = load_tile_amax(act_amax, row_block, feature_start, NUM_FEATURES, live)
            store_rows_of_tile(
                d_up, row_data, row_scale, row_block, NUM_FEATURES + feature_start, width, capacity, POW2
            )
            store_tokens_of_tile(
                d_gate, None, token_data, token_scale, group_start, group_end, row_block, feature_start,
                0, 2, NUM_FEATURES, live, capacity, INTERLEAVED, PER_EXPERT, POW2,
            )  # fmt: skip
            store_rows_of_tile(d_gate, row_data, row_scale, row_block, feature_start, width, capacity, POW2)
            act = stash.load(BY_TOKENS)
            store_tokens_of_tile(
                act, tile_amax, act_data, act_scale, group_start, group_end, row_block, feature_start,
                0, 1, NUM_FEATURES, live, capacity, False, PER_EXPERT, POW2,
            )  # fmt: skip

        row, expert = next_row, next_expert
        if row_weights is not None:
            row_weight = next_weight
        next_row = load_block(row_source, later_block, CAPACITY, to_sum)
        next_expert = load_expert(row_expert, later_block, CAPACITY)
    async_copy.wait_group(0)


def launch_quantize_swiglu_backward_hopper(
    d_act: Tensor,
    x: Tensor | RowOperand,
    groups: TokenGroups,
    d_x_rows: RowOperand,
    d_x_tokens: TokenOperand,
    act_tokens: TokenOperand,
    weight_parts: Tensor | None,
    *,
    row_weights: Tensor | None,
    pow2: bool,
    act: GatedActivation,
    act_amax: Tensor | None = None,
    multiprocessors: int,
) -> None:
    """As `launch_quantize_swiglu_backward`, for inputs of 16-byte vectors.

    `d_act` and `x` are bf16 or fp16, begin at a multiple of 16 bytes, and their row strides are multiples of 16. Both
    token operands have the same layout. `multiprocessors` is how many thread blocks to launch, at most.
    """
    blocks = count_tiles(d_act, groups)
    if blocks == 0:
        return
    launch(
        quantize_swiglu_backward_hopper_kernel, min(blocks, multiprocessors),
        *kernel_arguments(d_act, x, row_weights, groups, d_x_rows, d_x_tokens, act_tokens, act_amax, weight_parts, act),
        PER_EXPERT=d_x_tokens.layout is TokenLayout.PER_EXPERT, POW2=pow2,
        PARAMETERS=act.gate.parameters, INTERLEAVED=act.interleaved, GATE=GATES[act.gate.kind],
        num_warps=8,
    )  # fmt: skip


def has_twin(act: GatedActivation) -> bool:
    """Whether the kernel for Hopper makes this activation. It has no registers left for a bias: with the sums for its
    gradient, up to 470 bytes a thread would spill."""
    return act.gate.kind in GATES and act.bias is None
