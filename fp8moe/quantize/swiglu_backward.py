"""The backward of a gated activation, fused with the quantization of its gradients and of the activation once more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import multiprocessors, runs_hopper_kernels, runs_triton_fp8
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenLayout, TokenOperand, tensors_of
from fp8moe.quantize import reference, swiglu_reference
from fp8moe.quantize.gated import Gate
from fp8moe.quantize.swiglu_forward import neighbours_contiguous
from fp8moe.torch_op import torch_op


@dataclass(frozen=True, eq=False)
class SwiGLUGradients:
    """What `quantize_swiglu_backward` makes, None what was not asked for. `R` padded rows, `I` features of the
    activation."""

    d_x_rows: RowOperand | None
    """The gradient of gate and up, `(R, 2I)`: for dgrad."""
    d_x_tokens: TokenOperand | None
    """The same, `(2I, R)`: for wgrad."""
    act_tokens: TokenOperand | None
    """The activation once more, `(I, R)`: for the wgrad of the GEMM that takes it."""
    d_row_weights: Tensor | None
    """fp32 `(rows,)`, zeros for rows of no group; the same bits every time."""


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
    long_tiles: LongTiles | None = None,
    gate: Gate = Gate.SWIGLU,
) -> SwiGLUGradients:
    """All that the backward of an expert needs around its activation, from one read of `d_act` and `x`.

    Args:
        d_act: bf16, fp16 or fp32 `(rows, I)`: the gradient of the activation; row strides as for `x`.
        x, groups, scale_format, row_weights, gate: as given to `quantize_swiglu` in forward.
        d_x_rows, d_x_tokens, act_tokens, d_row_weights: what to make of `SwiGLUGradients`.
        layout: of the token operands.
        long_tiles: of `act_tokens`, as in `quantize_swiglu`; the tiles of `d_x_tokens` have 128 tokens in any case.
    """
    token_tile = long_tiles.token_tile if long_tiles else BLOCK
    stored = list(
        _quantize_swiglu_backward(
            d_act, x, groups.tensors, d_x_rows, d_x_tokens, act_tokens, d_row_weights, layout.value,
            token_tile, long_tiles.amax if long_tiles else None, row_weights, scale_format.value, gate.value,
        )
    )  # fmt: skip
    weights_gradient = stored.pop() if d_row_weights else None
    pairs = iter(zip(stored[::2], stored[1::2], strict=True))
    return SwiGLUGradients(
        RowOperand(*next(pairs)) if d_x_rows else None,
        TokenOperand.of(next(pairs), layout) if d_x_tokens else None,
        TokenOperand.of(next(pairs), layout, token_tile) if act_tokens else None,
        weights_gradient,
    )


def _of_whole_vectors(x: Tensor) -> bool:
    """Whether the rows of `x` are what the backward kernel for Hopper copies: vectors of 8 elements at multiples of 16
    bytes. Of a row stride its compiler knows only whether it is a multiple of 16 elements, so that is asked."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


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
    scale_format: str,
    gate: str,
) -> list[Tensor]:
    groups, format_ = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format)
    if runs_triton_fp8(x.device):
        num_rows, num_features = d_act.shape
        rows, tokens, activation = _empty_gradients(d_act, plan, d_x_rows, d_x_tokens, act_tokens, layout)
        weight_sums = None
        if d_row_weights:
            weight_sums = torch.zeros(num_features // BLOCK, num_rows, dtype=torch.float32, device=x.device)
        features, weights = neighbours_contiguous(x, row_weights)
        gradient, _ = neighbours_contiguous(d_act, None)
        options: dict[str, Any] = {
            "row_weights": weights, "pow2": format_ is ScaleFormat.POW2, "act_amax": act_amax, "gate": gate,
        }  # fmt: skip
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
    d_x, weights_gradient = swiglu_reference.swiglu_backward(d_act, x, row_weights, Gate(gate))
    act = swiglu_reference.swiglu(x, row_weights, Gate(gate))
    d_x_operands = reference.quantize_operands(d_x, groups, format_, d_x_rows, token_layout if d_x_tokens else None)
    long_tiles = None if act_amax is None else LongTiles(act_token_tile, act_amax)
    act_operand = reference.quantize_tokens_in(long_tiles, act, groups, format_, token_layout) if act_tokens else None
    stored = tensors_of(*d_x_operands, act_operand)
    return [*stored, swiglu_reference.zero_rows_of_no_group(weights_gradient, groups)] if d_row_weights else stored
