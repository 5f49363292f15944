"""SwiGLU fused with the quantization of what it makes, between the GEMMs of an expert: operators and operands.

Forward makes the activation, backward makes the gradients of gate and up and the activation once more. Nothing of it is
ever stored in high precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import multiprocessors, runs_hopper_kernels, runs_triton, runs_triton_fp8
from fp8moe.operands import (
    BLOCK,
    LongTiles,
    RowOperand,
    TokenGroups,
    TokenLayout,
    TokenOperand,
    empty_operands,
    tensors_of,
)
from fp8moe.quantize import reference, swiglu_reference
from fp8moe.quantize.swiglu_reference import GateUpLayout
from fp8moe.torch_op import torch_op


@dataclass(frozen=True, eq=False)
class SwiGLUGradients:
    """What SwiGLU's backward makes; what was not asked for is None. `R` padded rows, `I` features of the activation."""

    d_x_rows: RowOperand | None
    """The gradient of gate and up, `(R, 2I)`: for dgrad."""
    d_x_tokens: TokenOperand | None
    """The same, `(2I, R)`: for wgrad."""
    act_tokens: TokenOperand | None
    """The activation once more, `(I, R)`: for the wgrad of the GEMM that takes it."""
    d_row_weights: Tensor | None
    """fp32 `(rows,)`, zeros for rows of no group; the same bits every time."""


def quantize_swiglu(
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    *,
    rows: bool = True,
    tokens: TokenLayout | None = None,
    row_weights: Tensor | None = None,
    halves: GateUpLayout = GateUpLayout.GATE_UP,
    round_through_bf16: bool = False,
    long_tiles: LongTiles | None = None,
) -> tuple[RowOperand | None, TokenOperand | None]:
    """The quantized activation `gate * sigmoid(gate) * up` of each row, times its weight, from one read of `x`.

    Args:
        x: bf16, fp16 or fp32 `(rows, 2I)`, `I` a multiple of 128; any row stride (other features are copied first).
        groups: the plan: experts and padded rows. Of an `x` that is padded itself: `groups.gathering` the numbers
            of its own rows, -1 on padding.
        scale_format: as in `FP8Config`.
        rows: whether to make the row operand `(R, I)`.
        tokens: the layout of the token operand `(I, R)`; None makes none.
        row_weights: any float dtype `(rows,)`.
        halves: which half of `x` is the gate.
        round_through_bf16: round the activation to bf16 first, for the bits of `swiglu`, then quantization.
        long_tiles: what `quantize_swiglu_and_measure` found, to quantize the tokens in; None: tiles of 128 tokens.
    """
    stored = _quantize_swiglu(
        x, groups.tensors, rows, tokens and tokens.value, *_parts(long_tiles),
        row_weights, halves.value, scale_format.value, round_through_bf16,
    )  # fmt: skip
    return (
        RowOperand(*stored[:2]) if rows else None,
        TokenOperand.of(stored[-2:], tokens, _token_tile(long_tiles)) if tokens else None,
    )


def quantize_swiglu_and_measure(
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    token_tile: int,
    *,
    row_weights: Tensor | None = None,
    halves: GateUpLayout = GateUpLayout.GATE_UP,
    round_through_bf16: bool = False,
) -> tuple[RowOperand, LongTiles]:
    """The row operand of `quantize_swiglu`, and what it takes to make the token operand later, in tiles of `token_tile`
    tokens, 256 or 512; the other arguments as there."""
    row_data, row_scale, amax = _quantize_swiglu_and_measure(
        x, groups.tensors, token_tile, row_weights, halves.value, scale_format.value, round_through_bf16
    )
    return RowOperand(row_data, row_scale), LongTiles(token_tile, amax)


def quantize_swiglu_backward(
    d_act: Tensor,
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    *,
    d_x_rows: bool = True,
    d_x_tokens: bool = True,
    act_tokens: bool = True,
    d_row_weights: bool = False,
    layout: TokenLayout = TokenLayout.PER_EXPERT,
    row_weights: Tensor | None = None,
    halves: GateUpLayout = GateUpLayout.GATE_UP,
    round_through_bf16: bool = False,
    long_tiles: LongTiles | None = None,
) -> SwiGLUGradients:
    """All that the backward of an expert needs around its activation, from one read of `d_act` and `x`.

    Args:
        d_act: bf16, fp16 or fp32 `(rows, I)`: the gradient of the activation; row strides as for `x`.
        x, groups, scale_format, row_weights, halves: as given to `quantize_swiglu` in forward.
        d_x_rows, d_x_tokens, act_tokens, d_row_weights: what to make of `SwiGLUGradients`.
        layout: of the token operands.
        round_through_bf16: as in forward; it is the activation that is rounded, not the gradients.
        long_tiles: of `act_tokens`, as in `quantize_swiglu`; the tiles of `d_x_tokens` have 128 tokens in any case.
    """
    stored = list(
        _quantize_swiglu_backward(
            d_act, x, groups.tensors, d_x_rows, d_x_tokens, act_tokens, d_row_weights,
            layout.value, *_parts(long_tiles), row_weights, halves.value, scale_format.value, round_through_bf16,
        )
    )  # fmt: skip
    weights_gradient = stored.pop() if d_row_weights else None
    pairs = iter(zip(stored[::2], stored[1::2], strict=True))
    return SwiGLUGradients(
        RowOperand(*next(pairs)) if d_x_rows else None,
        TokenOperand.of(next(pairs), layout) if d_x_tokens else None,
        TokenOperand.of(next(pairs), layout, _token_tile(long_tiles)) if act_tokens else None,
        weights_gradient,
    )


def swiglu(x: Tensor, row_weights: Tensor | None = None, halves: GateUpLayout = GateUpLayout.GATE_UP) -> Tensor:
    """The activation in bf16 `(rows, I)`, not quantized; `x` `(rows, 2I)` for any `I`, the rest as in
    `quantize_swiglu`. Quantized afterwards, it has the bits of `quantize_swiglu(..., round_through_bf16=True)`."""
    return _swiglu(x, row_weights, halves.value)


def neighbours_contiguous(x: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as the kernels take them: copied where the features of a row, or the weights, do not lie side by side."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, row_weights if row_weights is None else row_weights.contiguous()


def _token_tile(long_tiles: LongTiles | None) -> int:
    return long_tiles.token_tile if long_tiles else BLOCK


def _parts(long_tiles: LongTiles | None) -> tuple[int, Tensor | None]:
    """As the operators take them."""
    return _token_tile(long_tiles), long_tiles.amax if long_tiles else None


def _of_whole_vectors(x: Tensor) -> bool:
    """Whether the rows of `x` are what the backward kernel for Hopper copies: vectors of 8 elements at multiples of 16
    bytes. Of a row stride its compiler knows only whether it is a multiple of 16 elements, so that is asked."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


def _empty_operands(
    x: Tensor, plan: Sequence[Tensor], rows: bool, tokens: str | None, *options: object
) -> tuple[RowOperand | None, TokenOperand | None]:
    capacity = TokenGroups(x.shape[0], *plan).capacity
    return empty_operands(capacity, x.shape[1] // 2, rows, TokenLayout(tokens) if tokens else None, x.device)


@torch_op(fake=lambda *args: tensors_of(*_empty_operands(*args)))
def _quantize_swiglu(
    x: Tensor,
    plan: Sequence[Tensor],
    rows: bool,
    tokens: str | None,
    token_tile: int,
    tile_amax: Tensor | None,
    row_weights: Tensor | None,
    halves: str,
    scale_format: str,
    round_through_bf16: bool,
) -> list[Tensor]:
    groups, format_, gate_up = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format), GateUpLayout(halves)
    if runs_triton_fp8(x.device):
        operands = _empty_operands(x, plan, rows, tokens)
        _launch_forward(x, groups, *operands, row_weights, gate_up, format_, round_through_bf16, tile_amax=tile_amax)
        return tensors_of(*operands)
    act = swiglu_reference.swiglu(x, gate_up, row_weights, round_through_bf16)
    long_tiles = None if tile_amax is None else LongTiles(token_tile, tile_amax)
    return tensors_of(
        reference.quantize_rows(act, groups, format_) if rows else None,
        reference.quantize_tokens_in(long_tiles, act, groups, format_, TokenLayout(tokens)) if tokens else None,
    )


def _launch_forward(
    x: Tensor, groups: TokenGroups, rows: RowOperand | None, tokens: TokenOperand | None,
    row_weights: Tensor | None, halves: GateUpLayout, scale_format: ScaleFormat, round_through_bf16: bool,
    **maxima: Tensor | None,
) -> None:  # fmt: skip
    """`launch_quantize_swiglu` of an `x` of any strides; `maxima` as there."""
    from fp8moe.kernels.swiglu_forward import launch_quantize_swiglu

    features, weights = neighbours_contiguous(x, row_weights)
    pow2 = scale_format is ScaleFormat.POW2
    launch_quantize_swiglu(
        features, groups, rows, tokens,
        halves=halves, row_weights=weights, pow2=pow2, round_through_bf16=round_through_bf16, **maxima,
    )  # fmt: skip


def _empty_rows_and_amax(x: Tensor, plan: Sequence[Tensor], *options: object) -> tuple[RowOperand, Tensor]:
    capacity, num_features = TokenGroups(x.shape[0], *plan).capacity, x.shape[1] // 2
    amax = torch.empty(capacity // BLOCK, num_features, dtype=torch.float32, device=x.device)
    return RowOperand.empty(capacity, num_features, x.device), amax


def _fake_rows_and_amax(*args: Any) -> list[Tensor]:
    rows, amax = _empty_rows_and_amax(*args)
    return [*rows.tensors, amax]


@torch_op(fake=_fake_rows_and_amax)
def _quantize_swiglu_and_measure(
    x: Tensor,
    plan: Sequence[Tensor],
    token_tile: int,
    row_weights: Tensor | None,
    halves: str,
    scale_format: str,
    round_through_bf16: bool,
) -> list[Tensor]:
    groups, format_, gate_up = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format), GateUpLayout(halves)
    if runs_triton_fp8(x.device):
        from fp8moe.kernels.long_tiles import PART, launch_long_tile_amax

        rows, tile_amax = _empty_rows_and_amax(x, plan)
        part_amax = tile_amax.new_empty(groups.capacity // PART, tile_amax.shape[1])
        _launch_forward(x, groups, rows, None, row_weights, gate_up, format_, round_through_bf16, part_amax=part_amax)
        launch_long_tile_amax(part_amax, groups, token_tile, tile_amax)
        return [*rows.tensors, tile_amax]
    act = swiglu_reference.swiglu(x, gate_up, row_weights, round_through_bf16)
    rows = reference.quantize_rows(act, groups, format_)
    return [*rows.tensors, reference.measure_long_tiles(act, groups, token_tile).amax]


def _empty_gradients(
    d_act: Tensor, plan: Sequence[Tensor], d_x_rows: bool, d_x_tokens: bool, act_tokens: bool, layout: str
) -> tuple[RowOperand | None, TokenOperand | None, TokenOperand | None]:
    num_rows, num_features = d_act.shape
    capacity, layout_ = TokenGroups(num_rows, *plan).capacity, TokenLayout(layout)
    return (
        RowOperand.empty(capacity, 2 * num_features, d_act.device) if d_x_rows else None,
        TokenOperand.empty(capacity, 2 * num_features, layout_, d_act.device) if d_x_tokens else None,
        TokenOperand.empty(capacity, num_features, layout_, d_act.device) if act_tokens else None,
    )


def _fake_gradients(
    d_act: Tensor,
    x: Tensor,
    plan: Sequence[Tensor],
    d_x_rows: bool,
    d_x_tokens: bool,
    act_tokens: bool,
    d_row_weights: bool,
    layout: str,
    *options: object,
) -> list[Tensor]:
    stored = tensors_of(*_empty_gradients(d_act, plan, d_x_rows, d_x_tokens, act_tokens, layout))
    return [*stored, x.new_empty(x.shape[0], dtype=torch.float32)] if d_row_weights else stored


@torch_op(fake=_fake_gradients)
def _quantize_swiglu_backward(
    d_act: Tensor,
    x: Tensor,
    plan: Sequence[Tensor],
    d_x_rows: bool,
    d_x_tokens: bool,
    act_tokens: bool,
    d_row_weights: bool,
    layout: str,
    act_token_tile: int,
    act_amax: Tensor | None,
    row_weights: Tensor | None,
    halves: str,
    scale_format: str,
    round_through_bf16: bool,
) -> list[Tensor]:
    groups, format_, gate_up = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format), GateUpLayout(halves)
    if runs_triton_fp8(x.device):
        num_rows, num_features = d_act.shape
        rows, tokens, activation = _empty_gradients(d_act, plan, d_x_rows, d_x_tokens, act_tokens, layout)
        weight_sums = None
        if d_row_weights:
            weight_sums = torch.zeros(num_features // BLOCK, num_rows, dtype=torch.float32, device=x.device)
        features, weights = neighbours_contiguous(x, row_weights)
        gradient, _ = neighbours_contiguous(d_act, None)
        options: dict[str, Any] = {
            "halves": gate_up,
            "row_weights": weights,
            "pow2": format_ is ScaleFormat.POW2,
            "round_through_bf16": round_through_bf16,
            "act_amax": act_amax,
        }
        whole_vectors = _of_whole_vectors(gradient) and _of_whole_vectors(features)
        if rows and tokens and activation and whole_vectors and runs_hopper_kernels(x.device):
            from fp8moe.kernels.sm90.swiglu_backward import launch_quantize_swiglu_backward_hopper

            launch_quantize_swiglu_backward_hopper(
                gradient, features, groups, rows, tokens, activation, weight_sums,
                multiprocessors=multiprocessors(x.device), **options,
            )  # fmt: skip
        else:
            from fp8moe.kernels.swiglu_backward import launch_quantize_swiglu_backward

            launch_quantize_swiglu_backward(
                gradient, features, groups, rows, tokens, activation, weight_sums, **options
            )
        return [*tensors_of(rows, tokens, activation), *([] if weight_sums is None else [weight_sums.sum(0)])]

    token_layout = TokenLayout(layout)
    d_x, weights_gradient = swiglu_reference.swiglu_backward(d_act, x, gate_up, row_weights)
    act = swiglu_reference.swiglu(x, gate_up, row_weights, round_through_bf16)
    d_x_operands = reference.quantize_operands(d_x, groups, format_, d_x_rows, token_layout if d_x_tokens else None)
    long_tiles = None if act_amax is None else LongTiles(act_token_tile, act_amax)
    act_operand = reference.quantize_tokens_in(long_tiles, act, groups, format_, token_layout) if act_tokens else None
    stored = tensors_of(*d_x_operands, act_operand)
    return [*stored, swiglu_reference.zero_rows_of_no_group(weights_gradient, groups)] if d_row_weights else stored


@torch_op(fake=lambda x, *_: x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.bfloat16))
def _swiglu(x: Tensor, row_weights: Tensor | None, halves: str) -> Tensor:
    if runs_triton(x.device):
        from fp8moe.kernels.swiglu_quantize import launch_swiglu

        out = x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.bfloat16)
        features, weights = neighbours_contiguous(x, row_weights)
        launch_swiglu(
            features,
            out,
            halves=GateUpLayout(halves),
            row_weights=weights,
        )
        return out
    return swiglu_reference.swiglu(x, GateUpLayout(halves), row_weights, False).bfloat16()
