"""The backward of a gated activation, fused with the quantization of its gradients and of the activation once more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import multiprocessors, runs_hopper_kernels, runs_triton_fp8
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
from fp8moe.quantize.swiglu_forward import flat, neighbours_contiguous, unflat
from fp8moe.torch_op import torch_op


@dataclass(frozen=True, eq=False)
class SwiGLUGradients:
    """What `quantize_swiglu_backward` makes, None what was not asked for. `R` padded rows, `I` features of the
    activation, `Ip` with their padding; without a gate, `I` for `2I`."""

    d_x_rows: RowOperand | None
    """The gradient of gate and up, `(R, 2Ip)`: for dgrad."""
    d_x_tokens: TokenOperand | None
    """The same, `(2I, R)`, its features in the order of the parameters: for wgrad."""
    act_tokens: TokenOperand | None
    """The activation once more, `(I, R)`: for the wgrad of the GEMM that takes it."""
    d_row_weights: Tensor | None
    """fp32 `(Ip/128, rows)`, from each block of features a part of each row's sum (`sums_at_rows`); the same bits every
    time, unspecified for rows of no group."""
    d_bias: Tensor | None
    """fp32 `(E, 2I)`, its features in the order of the parameters, zeros without rows; the same bits every time."""


def quantize_swiglu_backward(
    d_act: Tensor,
    x: Tensor | RowOperand,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    *,
    d_x_rows: bool = True,
    d_x_tokens: bool = True,
    act_tokens: bool = True,
    d_row_weights: bool = False,
    d_bias: bool = False,
    layout: TokenLayout = TokenLayout.PER_EXPERT,
    row_weights: Tensor | None = None,
    long_tiles: LongTiles | None = None,
    act: GatedActivation | None = None,
) -> SwiGLUGradients:
    """All that the backward of an expert needs around its activation, from one read of `d_act` and `x`.

    Args:
        d_act: bf16, fp16 or fp32 `(rows, Ip)`, zeros past `I`: the gradient of the activation; row strides as for `x`.
        x, groups, scale_format, row_weights, act: as given to `quantize_swiglu` in forward.
        d_x_rows, d_x_tokens, act_tokens, d_row_weights, d_bias: what to make of `SwiGLUGradients`.
        layout: of the token operands.
        long_tiles: of `act_tokens`, as in `quantize_swiglu`; the tiles of `d_x_tokens` have 128 tokens in any case.
    """
    token_tile, (values, x_scale) = long_tiles.token_tile if long_tiles else BLOCK, data_and_scale(x)
    stored = list(
        _quantize_swiglu_backward(
            d_act, values, x_scale, groups.tensors, d_x_rows, d_x_tokens, act_tokens, d_row_weights, d_bias,
            layout.value, token_tile, long_tiles.amax if long_tiles else None, row_weights, scale_format.value,
            *flat(act or swiglu_reference.plain_swiglu(values)),
        )
    )  # fmt: skip
    bias_gradient = stored.pop() if d_bias else None
    weights_gradient = stored.pop() if d_row_weights else None
    pairs = iter(zip(stored[::2], stored[1::2], strict=True))
    return SwiGLUGradients(
        RowOperand(*next(pairs)) if d_x_rows else None,
        TokenOperand.of(next(pairs), layout) if d_x_tokens else None,
        TokenOperand.of(next(pairs), layout, token_tile) if act_tokens else None,
        weights_gradient,
        bias_gradient,
    )


def _of_whole_vectors(x: Tensor) -> bool:
    """Whether the rows of `x` are what the backward kernel for Hopper copies: vectors of 16 bytes at multiples of 16
    bytes. Of a row stride its compiler knows only whether it is a multiple of 16 elements, so that is asked."""
    return (
        x.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
        and x.data_ptr() % 16 == 0
        and x.stride(0) % 16 == 0
    )


def _empty_gradients(
    d_act: Tensor, plan: Sequence[Tensor], d_x_rows: bool, d_x_tokens: bool, act_tokens: bool, layout: str,
    num_features: int, gate: str,
) -> tuple[RowOperand | None, TokenOperand | None, TokenOperand | None]:  # fmt: skip
    num_rows, padded_features = d_act.shape
    capacity, layout_, halves = (
        TokenGroups(num_rows, *plan).capacity,
        TokenLayout(layout),
        Gate.of_code(gate).projections,
    )
    return (
        RowOperand.empty(capacity, halves * padded_features, d_act.device) if d_x_rows else None,
        TokenOperand.empty(capacity, halves * num_features, layout_, d_act.device) if d_x_tokens else None,
        TokenOperand.empty(capacity, num_features, layout_, d_act.device) if act_tokens else None,
    )


def _empty_weight_parts(d_act: Tensor) -> Tensor:
    num_rows, padded_features = d_act.shape
    return torch.empty((padded_features // BLOCK, num_rows), dtype=torch.float32, device=d_act.device)


def _empty_bias_gradient(d_act: Tensor, plan: Sequence[Tensor], num_features: int, gate: str) -> Tensor:
    num_experts, width = plan[0].shape[0], Gate.of_code(gate).projections * num_features
    return d_act.new_empty((num_experts, width), dtype=torch.float32)


def _fake_gradients(
    d_act: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    plan: Sequence[Tensor],
    d_x_rows: bool,
    d_x_tokens: bool,
    act_tokens: bool,
    d_row_weights: bool,
    d_bias: bool,
    layout: str,
    act_token_tile: int,
    act_amax: Tensor | None,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    *options: object,
) -> list[Tensor]:
    made = _empty_gradients(d_act, plan, d_x_rows, d_x_tokens, act_tokens, layout, num_features, gate)
    return [
        *tensors_of(*made),
        *([_empty_weight_parts(d_act)] if d_row_weights else []),
        *([_empty_bias_gradient(d_act, plan, num_features, gate)] if d_bias else []),
    ]


@torch_op(fake=_fake_gradients)
def _quantize_swiglu_backward(
    d_act: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    plan: Sequence[Tensor],
    d_x_rows: bool,
    d_x_tokens: bool,
    act_tokens: bool,
    d_row_weights: bool,
    d_bias: bool,
    layout: str,
    act_token_tile: int,
    act_amax: Tensor | None,
    row_weights: Tensor | None,
    scale_format: str,
    num_features: int,
    gate: str,
    bias: Tensor | None,
    interleaved: bool,
) -> list[Tensor]:
    groups, format_ = TokenGroups(d_act.shape[0], *plan), ScaleFormat(scale_format)
    act = unflat(num_features, gate, bias, interleaved)
    if runs_triton_fp8(x.device) and num_features > 1:  # see `missing_for_sizes` of TritonGemm
        from fp8moe.kernels.block_sums import launch_block_sums

        operands = _empty_gradients(d_act, plan, d_x_rows, d_x_tokens, act_tokens, layout, num_features, gate)
        weight_parts = _empty_weight_parts(d_act) if d_row_weights else None
        bias_sums = None
        if d_bias:
            bias_sums = d_act.new_empty((groups.capacity // BLOCK, act.width), dtype=torch.float32)
        _launch(d_act, x, x_scale, groups, operands, weight_parts, bias_sums, row_weights, format_, act, act_amax)
        made = tensors_of(*operands)
        if weight_parts is not None:
            made.append(weight_parts)
        if bias_sums is not None:
            made.append(_empty_bias_gradient(d_act, plan, num_features, gate))
            launch_block_sums(bias_sums, groups, made[-1])
        return made

    token_layout = TokenLayout(layout)
    if x_scale is not None:
        x = swiglu_reference.stored_values(RowOperand(x, x_scale), groups)
    d_x, _ = swiglu_reference.swiglu_backward(d_act, x, row_weights, act, groups)
    values = swiglu_reference.swiglu(x, row_weights, act, groups)
    d_parameters = swiglu_reference.as_in_parameters(d_x, act)
    long_tiles = None if act_amax is None else LongTiles(act_token_tile, act_amax)
    made = tensors_of(
        reference.quantize_rows(swiglu_reference.padded(d_x, act), groups, format_) if d_x_rows else None,
        reference.quantize_tokens(d_parameters, groups, format_, token_layout) if d_x_tokens else None,
        reference.quantize_tokens_in(long_tiles, values, groups, format_, token_layout) if act_tokens else None,
    )
    if d_row_weights:
        made.append(swiglu_reference.weight_gradient_parts(d_act, x, act, groups))
    if d_bias:
        made.append(swiglu_reference.bias_gradient(d_parameters, groups))
    return made


def _launch(
    d_act: Tensor, x: Tensor, x_scale: Tensor | None, groups: TokenGroups,
    operands: tuple[RowOperand | None, TokenOperand | None, TokenOperand | None],
    weight_parts: Tensor | None, bias_sums: Tensor | None, row_weights: Tensor | None, scale_format: ScaleFormat,
    act: GatedActivation, act_amax: Tensor | None,
) -> None:  # fmt: skip
    """The kernel for Hopper where it does the work, else the Triton kernel; inputs of any strides."""
    features, weights = neighbours_contiguous(x, row_weights)
    gradient, _ = neighbours_contiguous(d_act, None)
    gate_up = features if x_scale is None else RowOperand(features, x_scale)
    rows, tokens, activation = operands
    options: dict[str, Any] = {
        "row_weights": weights, "pow2": scale_format is ScaleFormat.POW2, "act_amax": act_amax, "act": act,
    }  # fmt: skip
    whole_vectors = _of_whole_vectors(gradient) and _of_whole_vectors(features)
    if rows and tokens and activation and whole_vectors and runs_hopper_kernels(x.device):
        from fp8moe.kernels.sm90.swiglu_backward import has_twin, launch_quantize_swiglu_backward_hopper

        if has_twin(act):
            launch_quantize_swiglu_backward_hopper(
                gradient, gate_up, groups, rows, tokens, activation, weight_parts,
                multiprocessors=multiprocessors(x.device), **options,
            )  # fmt: skip
            return
    from fp8moe.kernels.swiglu_backward import launch_quantize_swiglu_backward

    launch_quantize_swiglu_backward(
        gradient, gate_up, groups, rows, tokens, activation, weight_parts, bias_sums, **options
    )
