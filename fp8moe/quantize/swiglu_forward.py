"""A gated activation fused with its quantization: between an expert's GEMMs it is never stored in high precision."""

from collections.abc import Sequence

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
    tensors_of,
)
from fp8moe.quantize import reference, swiglu_reference
from fp8moe.torch_op import torch_op


def quantize_swiglu(
    x: Tensor,
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
            `(rows, Ip)` without a gate. Any row stride (other features are copied first).
        groups: the plan: experts and padded rows. Of an `x` that is padded itself: `groups.gathering` the numbers
            of its own rows, -1 on padding.
        scale_format: as in `FP8Config`.
        rows: whether to make the row operand `(R, Ip)`.
        tokens: the layout of the token operand `(I, R)`; None makes none.
        row_weights: any float dtype `(rows,)`.
        long_tiles: what `quantize_swiglu_and_measure` found, to quantize the tokens in; None: tiles of 128 tokens.
        act: what to compute; None: SwiGLU of all features, without a bias.
    """
    token_tile = long_tiles.token_tile if long_tiles else BLOCK
    stored = _quantize_swiglu(
        x, groups.tensors, rows, tokens and tokens.value, token_tile, long_tiles.amax if long_tiles else None,
        row_weights, scale_format.value, *flat(act or swiglu_reference.plain_swiglu(x)),
    )  # fmt: skip
    return (
        RowOperand(*stored[:2]) if rows else None,
        TokenOperand.of(stored[-2:], tokens, token_tile) if tokens else None,
    )


def quantize_swiglu_and_measure(
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    token_tile: int,
    *,
    row_weights: Tensor | None = None,
    act: GatedActivation | None = None,
) -> tuple[RowOperand, LongTiles]:
    """The row operand of `quantize_swiglu`, and what it takes to make the token operand later, in tiles of `token_tile`
    tokens, 256 or 512; the other arguments as there."""
    row_data, row_scale, amax = _quantize_swiglu_and_measure(
        x, groups.tensors, token_tile, row_weights, scale_format.value,
        *flat(act or swiglu_reference.plain_swiglu(x)),
    )  # fmt: skip
    return RowOperand(row_data, row_scale), LongTiles(token_tile, amax)


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
        _launch(x, groups, *operands, row_weights, format_, act, tile_amax=tile_amax)
        return tensors_of(*operands)
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
    x: Tensor, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand | None,
    row_weights: Tensor | None, scale_format: ScaleFormat, act: GatedActivation, **maxima: Tensor | None,
) -> None:  # fmt: skip
    """`launch_quantize_swiglu` of an `x` of any strides; `maxima` as there."""
    from fp8moe.kernels.swiglu_forward import launch_quantize_swiglu

    features, weights = neighbours_contiguous(x, row_weights)
    pow2 = scale_format is ScaleFormat.POW2
    launch_quantize_swiglu(features, groups, rows, tokens, row_weights=weights, pow2=pow2, act=act, **maxima)


def _empty_rows_and_amax(
    x: Tensor,
    plan: Sequence[Tensor],
    token_tile: int,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    *options: object,
) -> list[Tensor]:
    capacity = TokenGroups(x.shape[0], *plan).capacity
    amax = torch.empty(capacity // BLOCK, num_features, dtype=torch.float32, device=x.device)
    return [*RowOperand.empty(capacity, x.shape[1] // Gate.of_code(gate).projections, x.device).tensors, amax]


@torch_op(fake=_empty_rows_and_amax)
def _quantize_swiglu_and_measure(
    x: Tensor,
    plan: Sequence[Tensor],
    token_tile: int,
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
        from fp8moe.kernels.long_tiles import PART, launch_long_tile_amax

        *row_tensors, tile_amax = _empty_rows_and_amax(
            x, plan, token_tile, row_weights, scale_format, num_features, gate
        )
        part_amax = tile_amax.new_empty(groups.capacity // PART, num_features)
        _launch(x, groups, RowOperand(*row_tensors), None, row_weights, format_, act, part_amax=part_amax)
        launch_long_tile_amax(part_amax, groups, token_tile, tile_amax)
        return [*row_tensors, tile_amax]
    values = swiglu_reference.swiglu(x, row_weights, act, groups)
    rows = _quantize_rows(values, groups, format_, act)
    return [*rows.tensors, reference.measure_long_tiles(values, groups, token_tile).amax]
