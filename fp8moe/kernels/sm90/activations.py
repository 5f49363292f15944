"""Kernel: what `activations.py` does where tokens are made, with layouts chosen by hand (Gluon), for Hopper.

A thread holds 16 tokens of 8 features: the maximum and the codes of a token tile stay within a warp, and a vector of
16 codes is stored from registers, where Triton's own choice of layouts crosses shared memory twice, with 16-way bank
conflicts. On an H200 tokens go from 0.80 to 0.90 of the copy rate, rows and tokens from one read from 0.78 to 0.86.

Where rows are gathered from tokens, several rows read each token, from L2 if it still is there: `find_block`.
"""

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon

from fp8moe.kernels import numerics
from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand

# The same source, compiled for tensors whose layouts are explicit.
dequantization_scale = gluon.jit(numerics.dequantization_scale.fn)
quantization_factor = gluon.jit(numerics.quantization_factor.fn)
long_tile_scaling = gluon.jit(numerics.long_tile_scaling.fn)
encode_e4m3 = gluon.jit(numerics.encode_e4m3.fn)

BY_FEATURES = gl.constexpr(gl.BlockedLayout([16, 8], [8, 4], [1, 4], [1, 0]))
"""A tile (128 rows, 128 features): 16 x 8 elements a thread, features in neighbouring registers."""
BY_TOKENS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [4, 0], [8, 0], [0, 1], [0, 2], [0, 4]],
        lane_bases=[[0, 8], [0, 16], [16, 0], [32, 0], [64, 0]],
        warp_bases=[[0, 32], [0, 64]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""The same elements a thread, tokens in neighbouring registers: one conversion makes the codes of two tokens."""
ROW_A_THREAD = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0]))
"""The maxima of 16 threads that share a row, (128, 16), gathered in one."""
FEATURE_BLOCKS = 4
"""How many blocks of 128 features a kernel that makes tokens alone does of all rows, before it goes on: the part of the
tokens that rows are gathered from then stays in L2. Rows are written faster whole."""


@gluon.jit
def find_block(number, row_blocks, feature_blocks, GROUP: gl.constexpr):
    """Row block and feature block of the `number`-th program: GROUP feature blocks of all rows after the other, or, if
    that is 0, all feature blocks of one row block after the other."""
    if GROUP == 0:
        first, width = 0, feature_blocks
    else:
        first = number // (row_blocks * GROUP) * GROUP
        width = min(GROUP, feature_blocks - first)
    within = number - first * row_blocks
    return within // width, first + within % width


@gluon.jit
def gather_rows(
    x, x_scale, source, feature_block, feature, stride_row, stride_feature, stride_scale, EVICTION: gl.constexpr,
    features_end=None,
):  # fmt: skip
    """fp32 `BY_FEATURES`: the rows `source` (zeros where that is -1, on padding) and features (zeros from
    `features_end` on) of `x`. Where `x` is codes, `x_scale` has their scales: one a row of `feature_block`."""
    source_offset = source.to(gl.int64) * stride_row
    feature_offset = feature.to(gl.int64) * stride_feature
    offsets = gl.expand_dims(source_offset, 1) + gl.expand_dims(feature_offset, 0)
    inside = gl.expand_dims(source >= 0, 1)
    if features_end is not None:
        inside = inside & gl.expand_dims(feature < features_end, 0)
    tile = gl.load(x + offsets, mask=inside, other=0.0, eviction_policy=EVICTION).to(gl.float32)
    if x_scale is not None:
        place = x_scale + source.to(gl.int64) * stride_scale + feature_block
        tile = tile * gl.expand_dims(gl.load(place, mask=source >= 0, other=1.0), 1)
    return tile


@gluon.jit
def store_rows(
    tile, row_data, row_scale, row_start, feature_block, feature, NUM_FEATURES, CAPACITY, POW2: gl.constexpr
):  # fmt: skip
    """Quantize `tile`, fp32 `BY_FEATURES`, along its features, into a row operand of NUM_FEATURES (whole blocks)."""
    partial = gl.reduce(gl.abs(tile).reshape((128, 16, 8)), 2, numerics.maximum)
    amax = gl.reduce(gl.convert_layout(partial, ROW_A_THREAD), 1, numerics.maximum)
    scale = dequantization_scale(amax, POW2)
    one_a_thread = gl.arange(0, 128, gl.SliceLayout(1, ROW_A_THREAD))
    gl.store(row_scale + feature_block.to(gl.int64) * CAPACITY + row_start + one_a_thread, scale)
    factor = gl.convert_layout(quantization_factor(amax, scale, POW2), gl.SliceLayout(1, BY_FEATURES))
    codes = encode_e4m3(tile, gl.expand_dims(factor, 1))
    row = row_start + gl.arange(0, 128, gl.SliceLayout(1, BY_FEATURES))
    offsets = gl.expand_dims(row.to(gl.int64) * NUM_FEATURES, 1) + gl.expand_dims(feature, 0)
    gl.store(row_data + offsets, codes)


@gluon.jit
def write_token_codes(
    codes, token_data, group_start, group_end, row_start, feature_start, NUM_FEATURES, CAPACITY,
    PER_EXPERT: gl.constexpr, MASK_FEATURES: gl.constexpr = False,
):  # fmt: skip
    """Write codes, tokens in neighbouring registers, to a token operand; the group's bounds matter only PER_EXPERT.
    With MASK_FEATURES some features may lie past NUM_FEATURES."""
    layout: gl.constexpr = codes.type.layout
    if PER_EXPERT:
        row_length = group_end - group_start
        start = group_start.to(gl.int64) * NUM_FEATURES + (row_start - group_start)
    else:
        row_length = CAPACITY
        start = row_start.to(gl.int64)
    token = gl.arange(0, 128, gl.SliceLayout(1, layout))
    feature = feature_start + gl.arange(0, 128, gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(feature.to(gl.int64) * row_length, 0) + gl.expand_dims(token, 1)
    if MASK_FEATURES:
        gl.store(token_data + start + offsets, codes, mask=gl.expand_dims(feature < NUM_FEATURES, 0))
    else:
        gl.store(token_data + start + offsets, codes)


@gluon.jit
def store_token_scale(pointers, scale, feature, features_end):
    """Write the scale of each feature before `features_end`, of all if that is None."""
    if features_end is None:
        gl.store(pointers, scale)
    else:
        gl.store(pointers, scale, mask=feature < features_end)


@gluon.jit
def quantize_activation_hopper_kernel(
    x,  # (M, NUM_FEATURES) bf16, fp16, fp32, or codes, e4m3; any strides
    x_scale,  # of codes: fp32 (M, feature blocks), blocks contiguous; else None
    row_source, row_expert, padded_ends,  # TokenGroups
    row_data, row_scale,  # e4m3 (CAPACITY, NUM_FEATURES in whole blocks); fp32 stored (that / 128, CAPACITY)
    token_data, token_scale,  # e4m3, see TokenLayout; fp32 stored (CAPACITY / 128, NUM_FEATURES)
    stride_row, stride_feature, stride_scale, NUM_FEATURES, CAPACITY,
    PER_EXPERT: gl.constexpr, POW2: gl.constexpr, MASK_FEATURES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One program quantizes 128 padded rows x 128 features, as tokens, and as rows unless `row_data` is None.
    MASK_FEATURES says that NUM_FEATURES is no multiple of 128; GROUP is for `find_block`."""
    feature_blocks = gl.cdiv(NUM_FEATURES, 128)
    features_end = NUM_FEATURES if MASK_FEATURES else None
    row_block, feature_block = find_block(gl.program_id(0), CAPACITY // 128, feature_blocks, GROUP)
    row_start = row_block * 128
    row = gl.arange(0, 128, gl.SliceLayout(1, BY_FEATURES))
    feature = feature_block * 128 + gl.arange(0, 128, gl.SliceLayout(0, BY_FEATURES))
    expert = gl.load(row_expert + row_start)  # groups are padded to 128 rows: a live block's first row is live
    source = gl.load(row_source + row_start + row)
    if row_data is None and expert < 0:  # tokens alone are faster with the branch here, both behind the loads
        return
    tile = gather_rows(
        x, x_scale, source, feature_block, feature, stride_row, stride_feature, stride_scale, "", features_end
    )  # fmt: skip
    if row_data is not None and expert < 0:
        return

    if row_data is not None:
        store_rows(tile, row_data, row_scale, row_start, feature_block, feature, feature_blocks * 128, CAPACITY, POW2)

    amax = gl.reduce(gl.abs(tile), 0, numerics.maximum)
    factor = quantization_factor(amax, dequantization_scale(amax, POW2), POW2)
    factor = gl.convert_layout(factor, gl.SliceLayout(0, BY_TOKENS))
    codes = encode_e4m3(gl.convert_layout(tile, BY_TOKENS), gl.expand_dims(factor, 0))
    # The compiler cannot see that loaded ends are aligned; told so, it stores whole vectors.
    group_start = gl.multiple_of(gl.load(padded_ends + expert - 1, mask=expert > 0, other=0), 128)
    group_end = gl.multiple_of(gl.load(padded_ends + expert), 128)
    write_token_codes(
        codes, token_data, group_start, group_end, row_start, feature_block * 128, NUM_FEATURES, CAPACITY,
        PER_EXPERT, MASK_FEATURES,
    )  # fmt: skip
    # Only now, or it costs the registers that let a fourth program run on a multiprocessor.
    scales = token_scale + row_block.to(gl.int64) * NUM_FEATURES + feature
    store_token_scale(scales, dequantization_scale(amax, POW2), feature, features_end)


def launch_quantize_activation_hopper(
    x: Tensor, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand, *, pow2: bool,
    x_scale: Tensor | None = None, feature_blocks: int = FEATURE_BLOCKS,
) -> None:  # fmt: skip
    """Quantize `x` `(M, D)`, `D` any size, into `tokens`, and into `rows` if given, in one pass. `x` may be codes with
    `x_scale`. Without rows the grid takes `feature_blocks` blocks of features at a time, all if that is 0."""
    num_features, capacity = x.shape[1], groups.capacity
    blocks = (capacity // BLOCK) * ceil_div(num_features, BLOCK)
    if blocks == 0:
        return
    launch(
        quantize_activation_hopper_kernel, blocks,
        x, x_scale,
        groups.row_source, groups.row_expert, groups.padded_ends,
        rows and rows.data, rows and rows.stored_scale, tokens.data, tokens.stored_scale,
        x.stride(0), x.stride(1), 0 if x_scale is None else x_scale.stride(0), num_features, capacity,
        PER_EXPERT=tokens.layout is TokenLayout.PER_EXPERT, POW2=pow2, MASK_FEATURES=num_features % BLOCK != 0,
        GROUP=0 if rows else feature_blocks,
        num_warps=4,
    )  # fmt: skip
