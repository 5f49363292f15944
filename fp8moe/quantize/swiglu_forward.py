"""A gated activation fused with its quantization: between an expert's GEMMs it is never stored in high precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_triton_fp8
from fp8moe.gate import Gate, GatedActivation
from fp8moe.operands import (
    BLOCK,
    LongTiles,
    RowOperand,
    TokenGroups,
    TokenLayout,
    TokenOperand,
    data_and_scale,
    tensors_of,
)
from fp8moe.quantize import reference, swiglu_reference
from fp8moe.torch_op import torch_op


def quantize_swiglu(
    x: Tensor | RowOperand,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    *,
    rows: bool = True,
    tokens: TokenLayout | None = None,
    row_weights: Tensor | None = None,
    long_tiles: LongTiles | None = None,
    act: GatedActivation | None = None,
) -> tuple[RowOperand | None, TokenOperand | None]:
    """The quantized activation of each row, times its weight, from one read of `x`.

    Args:
        x: bf16, fp16 or fp32 `(rows, 2Ip)`, gate, then up, each padded with zeros to `Ip`, a multiple of 128;
            `(rows, Ip)` without a gate. Any row stride (other features are copied first). Or the same quantized
            `(R, 2Ip)`, of the rows of `groups`: it is rounded to bf16 where it is read.
        groups: the plan: experts and padded rows. Of an `x` that is padded itself: `groups.gathering` the numbers
            of its own rows, -1 on padding.
        scale_format: as in `FP8Config`.
        rows: whether to make the row operand `(R, Ip)`.
        tokens: the layout of the token operand `(I, R)`; None makes none.
        row_weights: any float dtype `(rows,)`.
        long_tiles: what `quantize_swiglu_forward` found, to quantize the tokens in; None: tiles of 128 tokens.
        act: what to compute; None: SwiGLU of all features, without a bias.
    """
    token_tile, (values, x_scale) = long_tiles.token_tile if long_tiles else BLOCK, data_and_scale(x)
    stored = _quantize_swiglu(
        values, x_scale, groups.tensors, rows, tokens and tokens.value, token_tile,
        long_tiles.amax if long_tiles else None, row_weights, scale_format.value,
        *flat(act or swiglu_reference.plain_swiglu(values)),
    )  # fmt: skip
    return (
        RowOperand(*stored[:2]) if rows else None,
        TokenOperand.of(stored[-2:], tokens, token_tile) if tokens else None,
    )


@dataclass(frozen=True, eq=False)
class SwiGLUForward:
    """What `quantize_swiglu_forward` makes."""

    rows: RowOperand
    """The activation, `(R, Ip)`."""
    x_rows: RowOperand | None
    """`x` itself, `(R, 2Ip)`, without the bias, in `ScaleFormat.FP32`: what backward needs of it."""
    long_tiles: LongTiles | None
    """Of the activation: what it takes to make its token operand later."""


def quantize_swiglu_forward(
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    *,
    token_tile: int = BLOCK,
    x_rows: bool = False,
    row_weights: Tensor | None = None,
    act: GatedActivation | None = None,
) -> SwiGLUForward:
    """All that the forward of an expert needs of its activation, from one read of `x`.

    Args:
        token_tile: how many tokens of the activation share a scale in backward; those of 256 and 512 are measured here.
        x_rows: whether to store `x` quantized.
        x, groups, scale_format, row_weights, act: as in `quantize_swiglu`; `x` in high precision.
    """
    stored = _quantize_swiglu_forward(
        x, groups.tensors, token_tile, x_rows, row_weights, scale_format.value,
        *flat(act or swiglu_reference.plain_swiglu(x)),
    )  # fmt: skip
    return SwiGLUForward(
        RowOperand(*stored[:2]),
        RowOperand(*stored[2:4]) if x_rows else None,
        LongTiles(token_tile, stored[-1]) if token_tile > BLOCK else None,
    )


def flat(act: GatedActivation) -> tuple[int, str, Tensor | None, bool]:
    """As operators take it: `unflat(*flat(act))` is the same."""
    return act.num_features, act.gate.code, act.bias, act.interleaved


def unflat(num_features: int, gate: str, bias: Tensor | None, interleaved: bool) -> GatedActivation:
    """Of what `flat` gives."""
    return GatedActivation(num_features, Gate.of_code(gate), bias, interleaved)


def neighbours_contiguous(x: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as the kernels take them: copied where the features of a row, or the weights, do not lie side by side."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, row_weights if row_weights is None else row_weights.contiguous()


def _empty_operands(
    x: Tensor, plan: Sequence[Tensor], rows: bool, tokens: str | None, num_features: int, gate: str
) -> tuple[RowOperand | None, TokenOperand | None]:
    capacity = TokenGroups(x.shape[0], *plan).capacity
    return (
        RowOperand.empty(capacity, x.shape[1] // Gate.of_code(gate).projections, x.device) if rows else None,
        TokenOperand.empty(capacity, num_features, TokenLayout(tokens), x.device) if tokens else None,
    )


def _fake_operands(
    x: Tensor,
    x_scale: Tensor | None,
    plan: Sequence[Tensor],
    rows: bool,
    tokens: str | None,
    token_tile: int,
    tile_amax: Tensor | None,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    *options: object,
) -> list[Tensor]:
    return tensors_of(*_empty_operands(x, plan, rows, tokens, num_features, gate))


@torch_op(fake=_fake_operands)
def _quantize_swiglu(
    x: Tensor,
    x_scale: Tensor | None,
    plan: Sequence[Tensor],
    rows: bool,
    tokens: str | None,
    token_tile: int,
    tile_amax: Tensor | None,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    bias: Tensor | None,
    interleaved: bool,
) -> list[Tensor]:
    groups, format_ = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format)
    act = unflat(num_features, gate, bias, interleaved)
    if runs_triton_fp8(x.device) and num_features > 1:  # see `missing_for_sizes` of TritonGemm
        operands = _empty_operands(x, plan, rows, tokens, num_features, gate)
        _launch(x, x_scale, groups, *operands, row_weights, format_, act, tile_amax=tile_amax)
        return tensors_of(*operands)
    if x_scale is not None:
        x = swiglu_reference.stored_values(RowOperand(x, x_scale), groups)
    values = swiglu_reference.swiglu(x, row_weights, act, groups)
    long_tiles = None if tile_amax is None else LongTiles(token_tile, tile_amax)
    return tensors_of(
        _quantize_rows(values, groups, format_, act) if rows else None,
        reference.quantize_tokens_in(long_tiles, values, groups, format_, TokenLayout(tokens)) if tokens else None,
    )


def _quantize_rows(values: Tensor, groups: TokenGroups, scale_format: ScaleFormat, act: GatedActivation) -> RowOperand:
    """The row operand `(R, Ip)` of an activation `(rows, I)`."""
    padding = act.padded_features - act.num_features
    return reference.quantize_rows(torch.nn.functional.pad(values, (0, padding)), groups, scale_format)


def _launch(
    x: Tensor, x_scale: Tensor | None, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand | None,
    row_weights: Tensor | None, scale_format: ScaleFormat, act: GatedActivation, **options: Any,
) -> None:  # fmt: skip
    """`launch_quantize_swiglu` of an `x` of any strides; `options` as there."""
    from fp8moe.kernels.swiglu_forward import launch_quantize_swiglu

    features, weights = neighbours_contiguous(x, row_weights)
    values = features if x_scale is None else RowOperand(features, x_scale)
    pow2 = scale_format is ScaleFormat.POW2
    launch_quantize_swiglu(values, groups, rows, tokens, row_weights=weights, pow2=pow2, act=act, **options)


def _empty_forward(
    x: Tensor,
    plan: Sequence[Tensor],
    token_tile: int,
    x_rows: bool,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    *options: object,
) -> list[Tensor]:
    capacity, width = TokenGroups(x.shape[0], *plan).capacity, x.shape[1]
    amax = torch.empty(capacity // BLOCK, num_features, dtype=torch.float32, device=x.device)
    return [
        *RowOperand.empty(capacity, width // Gate.of_code(gate).projections, x.device).tensors,
        *(RowOperand.empty(capacity, width, x.device).tensors if x_rows else []),
        *([amax] if token_tile > BLOCK else []),
    ]


@torch_op(fake=_empty_forward)
def _quantize_swiglu_forward(
    x: Tensor,
    plan: Sequence[Tensor],
    token_tile: int,
    x_rows: bool,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    bias: Tensor | None,
    interleaved: bool,
) -> list[Tensor]:
    groups, format_ = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format)
    act = unflat(num_features, gate, bias, interleaved)
    if runs_triton_fp8(x.device) and num_features > 1:  # see `missing_for_sizes` of TritonGemm
        made = _empty_forward(x, plan, token_tile, x_rows, row_weights, scale_format, num_features, gate)
        _launch(
            x, None, groups, RowOperand(*made[:2]), None, row_weights, format_, act,
            x_rows=RowOperand(*made[2:4]) if x_rows else None,
            measured=LongTiles(token_tile, made[-1].zero_()) if token_tile > BLOCK else None,
        )  # fmt: skip
        return made
    values = swiglu_reference.swiglu(x, row_weights, act, groups)
    made = tensors_of(
        _quantize_rows(values, groups, format_, act),
        reference.quantize_rows(x, groups, ScaleFormat.FP32) if x_rows else None,
    )
    if token_tile > BLOCK:
        made.append(reference.measure_long_tiles(values, groups, token_tile).amax)
    return made
