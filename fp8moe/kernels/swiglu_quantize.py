"""Kernel: a gated activation of rows as they are, with no experts, quantized in groups of features."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.gate import Gate
from fp8moe.kernels.activations import load_row_weights
from fp8moe.kernels.gated import GATES
from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from
from fp8moe.kernels.numerics import dequantization_scale, encode_e4m3, quantization_factor, row_amax

ELEMENTS = 4096
"""The elements of a program's tile, where a group leaves the choice."""


@triton.jit
def quantize_swiglu_rows_kernel(
    x,  # (NUM_ROWS, 2 * NUM_FEATURES) bf16, fp16 or fp32, features contiguous
    row_weights,  # (NUM_ROWS,) any float dtype, or None
    data,  # e4m3 (NUM_ROWS, NUM_FEATURES)
    scale,  # fp32, one for each row and group; PACKED: int32, the exponents of four groups of a row in a word
    stride_row, gate_start, up_start, stride_scale_row, stride_scale_column, NUM_ROWS, NUM_FEATURES,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, ROWS: tl.constexpr,
    POW2: tl.constexpr, PACKED: tl.constexpr, ROUND_THROUGH_BF16: tl.constexpr, ACTIVATION: tl.constexpr,
    PARAMETERS: tl.constexpr,
):  # fmt: skip
    """One program makes and quantizes ROWS rows x one group of GROUP features; PADDED_GROUP is a power of two."""
    num_groups = NUM_FEATURES // GROUP
    rows = tl.program_id(0) // num_groups * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) % num_groups
    within = tl.arange(0, PADDED_GROUP)
    features = group * GROUP + within
    inside = (rows < NUM_ROWS)[:, None] & (within < GROUP)[None, :]
    offsets = rows[:, None].to(tl.int64) * stride_row + features[None, :]
    gate = tl.load(x + gate_start + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + up_start + offsets, mask=inside, other=0.0).to(tl.float32)
    act = ACTIVATION(gate, up, PARAMETERS) * load_row_weights(row_weights, tl.where(rows < NUM_ROWS, rows, -1))[:, None]
    if ROUND_THROUGH_BF16:
        act = act.to(tl.bfloat16).to(tl.float32)
    amax = row_amax(act)
    group_scale = dequantization_scale(amax, POW2)
    codes = encode_e4m3(act, quantization_factor(amax, group_scale, POW2)[:, None])
    tl.store(data + rows[:, None].to(tl.int64) * NUM_FEATURES + features[None, :], codes, mask=inside)
    if PACKED:
        exponent = ((group_scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
        words = rows.to(tl.int64) * stride_scale_row + (group // 4).to(tl.int64) * stride_scale_column
        tl.store(
            scale.to(tl.pointer_type(tl.uint8), bitcast=True) + (words * 4 + group % 4), exponent, mask=rows < NUM_ROWS
        )
    else:
        offsets = rows.to(tl.int64) * stride_scale_row + group.to(tl.int64) * stride_scale_column
        tl.store(scale + offsets, group_scale, mask=rows < NUM_ROWS)


def launch_quantize_swiglu_rows(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    *,
    gate_start: int,
    up_start: int,
    group_size: int,
    row_weights: Tensor | None,
    pow2: bool,
    round_through_bf16: bool,
    gate: Gate,
) -> None:
    """The activation of `x` `(rows, 2I)`, features contiguous, into `data` and `scale`.

    Args:
        data: e4m3 `(rows, I)`, contiguous.
        scale: `(rows, groups)` in fp32, or packed UE8M0 `(rows, ceil(groups / 4))` in int32, where the bytes past the
            last group are left as they are. Any strides.
        gate_start, up_start: their first columns in `x`.
        group_size: divides `I`.
        row_weights: `(rows,)`, contiguous.
        gate: one that has a gate.
    """
    num_rows, num_features = data.shape
    padded_group = power_of_2_from(group_size)
    rows = max(1, ELEMENTS // padded_group)
    blocks = ceil_div(num_rows, rows) * (num_features // group_size)
    if blocks == 0:
        return
    launch(
        quantize_swiglu_rows_kernel, blocks,
        x, row_weights, data, scale,
        x.stride(0), gate_start, up_start, scale.stride(0), scale.stride(1), num_rows, num_features,
        GROUP=group_size, PADDED_GROUP=padded_group, ROWS=rows,
        POW2=pow2, PACKED=not scale.is_floating_point(), ROUND_THROUGH_BF16=round_through_bf16,
        ACTIVATION=GATES[gate.kind].activation, PARAMETERS=gate.parameters,
        num_warps=min(16, max(4, padded_group // 2048)),
    )  # fmt: skip
