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
from fp8moe.groups import TokenGroups
from fp8moe.operands import BLOCK, RowOperand, TokenLayout, TokenOperand, empty_operands, tensors_of
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
    """
    stored = _quantize_swiglu(
        x, groups.tensors, rows, tokens and tokens.value,
        row_weights, halves.value, scale_format.value, round_through_bf16,
    )  # fmt: skip
    return (
        RowOperand(*stored[:2]) if rows else None,
        TokenOperand.of(stored[-2:], tokens) if tokens else None,
    )


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
) -> SwiGLUGradients:
    """All that the backward of an expert needs around its activation, from one read of `d_act` and `x`.

    Args:
        d_act: bf16, fp16 or fp32 `(rows, I)`: the gradient of the activation; row strides as for `x`.
        x, groups, scale_format, row_weights, halves: as given to `quantize_swiglu`.
        d_x_rows, d_x_tokens, act_tokens, d_row_weights: what to make of `SwiGLUGradients`.
        layout: of the token operands.
        round_through_bf16: as given to `quantize_swiglu`; it is the activation that is rounded, not the gradients.
    """
    stored = list(
        _quantize_swiglu_backward(
            d_act, x, groups.tensors, d_x_rows, d_x_tokens, act_tokens, d_row_weights,
            layout.value, row_weights, halves.value, scale_format.value, round_through_bf16,
        )
    )  # fmt: skip
    weights_gradient = stored.pop() if d_row_weights else None
    pairs = iter(zip(stored[::2], stored[1::2], strict=True))
    return SwiGLUGradients(
        RowOperand(*next(pairs)) if d_x_rows else None,
        TokenOperand.of(next(pairs), layout) if d_x_tokens else None,
        TokenOperand.of(next(pairs), layout) if act_tokens else None,
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
    row_weights: Tensor | None,
    halves: str,
    scale_format: str,
    round_through_bf16: bool,
) -> list[Tensor]:
    groups, format_, gate_up = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format), GateUpLayout(halves)
    if runs_triton_fp8(x.device):
        from fp8moe.quantize.swiglu_forward import launch_quantize_swiglu

        operands = _empty_operands(x, plan, rows, tokens)
        features, weights = neighbours_contiguous(x, row_weights)
        launch_quantize_swiglu(
            features,
            groups,
            *operands,
            halves=gate_up,
            row_weights=weights,
            pow2=format_ is ScaleFormat.POW2,
            round_through_bf16=round_through_bf16,
        )
        return tensors_of(*operands)
    act = swiglu_reference.swiglu(x, gate_up, row_weights, round_through_bf16)
    token_layout = TokenLayout(tokens) if tokens else None
    return tensors_of(*reference.quantize_operands(act, groups, format_, rows, token_layout))


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
        }
        whole_vectors = _of_whole_vectors(gradient) and _of_whole_vectors(features)
        if rows and tokens and activation and whole_vectors and runs_hopper_kernels(x.device):
            from fp8moe.quantize.swiglu_backward_hopper import launch_quantize_swiglu_backward_hopper

            launch_quantize_swiglu_backward_hopper(
                gradient, features, groups, rows, tokens, activation, weight_sums,
                multiprocessors=multiprocessors(x.device), **options,
            )  # fmt: skip
        else:
            from fp8moe.quantize.swiglu_backward import launch_quantize_swiglu_backward

            launch_quantize_swiglu_backward(
                gradient, features, groups, rows, tokens, activation, weight_sums, **options
            )
        return [*tensors_of(rows, tokens, activation), *([] if weight_sums is None else [weight_sums.sum(0)])]

    token_layout = TokenLayout(layout)
    d_x, weights_gradient = swiglu_reference.swiglu_backward(d_act, x, gate_up, row_weights)
    act = swiglu_reference.swiglu(x, gate_up, row_weights, round_through_bf16)
    d_x_operands = reference.quantize_operands(d_x, groups, format_, d_x_rows, token_layout if d_x_tokens else None)
    _, act_operand = reference.quantize_operands(act, groups, format_, False, token_layout if act_tokens else None)
    stored = tensors_of(*d_x_operands, act_operand)
    return [*stored, swiglu_reference.zero_rows_of_no_group(weights_gradient, groups)] if d_row_weights else stored


@torch_op(fake=lambda x, *_: x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.bfloat16))
def _swiglu(x: Tensor, row_weights: Tensor | None, halves: str) -> Tensor:
    if runs_triton(x.device):
        from fp8moe.quantize.swiglu_rows import launch_swiglu

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
