"""The quantization functions of the package: each picks the kernel or the reference and is one opaque PyTorch operator.

The operators take and return plain contiguous tensors (scales as they are stored), because that is what a compiler's
fake tensors can promise; the functions around them speak in operand types.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_hopper_kernels, runs_triton_fp8
from fp8moe.groups import TokenGroups
from fp8moe.operands import (
    BLOCK,
    RowOperand,
    TokenLayout,
    TokenOperand,
    WeightOperand,
    empty_operands,
    tensors_of,
)
from fp8moe.quantize import reference
from fp8moe.torch_op import torch_op


def quantize_rows(x: Tensor, groups: TokenGroups, scale_format: ScaleFormat) -> RowOperand:
    """Quantize ragged rows along their features, padding each group to a multiple of 128 rows in the same pass.

    Args:
        x: bf16, fp16 or fp32 `(M, D)`, any strides, `D` a multiple of 128.
        groups: the plan for these `M` rows.
        scale_format: as in `FP8Config`.
    """
    stored = _quantize_activation(x, groups.tensors, True, None, BLOCK, scale_format.value)
    return RowOperand(*stored)


def quantize_tokens(
    x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout, token_tile: int = BLOCK
) -> TokenOperand:
    """Quantize ragged rows along the tokens of each group, feature-major.

    Args:
        x, groups, scale_format: as in `quantize_rows`.
        layout, token_tile: of the result, see `TokenOperand`.
    """
    stored = _quantize_activation(x, groups.tensors, False, layout.value, token_tile, scale_format.value)
    return TokenOperand.of(stored, layout, token_tile)


def quantize_rows_and_tokens(
    x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout, token_tile: int = BLOCK
) -> tuple[RowOperand, TokenOperand]:
    """Both operands of `x` from one read; arguments as in `quantize_tokens`."""
    stored = _quantize_activation(x, groups.tensors, True, layout.value, token_tile, scale_format.value)
    return RowOperand(*stored[:2]), TokenOperand.of(stored[2:], layout, token_tile)


def quantize_weight(w: Tensor | Sequence[Tensor], scale_format: ScaleFormat) -> tuple[WeightOperand, WeightOperand]:
    """Quantize a weight in 128 x 128 blocks, for forward `(E, N, K)` and for dgrad `(E, K, N)`, from one read.

    Args:
        w: bf16, fp16 or fp32 `(E, N, K)`, any strides, `N` and `K` multiples of 128; or several, `(E, N_i, K)`, which
            are quantized as one, stacked along `N`, without a high-precision copy.
        scale_format: as in `FP8Config`.
    """
    scale, forward_data, dgrad_data = _quantize_weight(_parts(w), True, True, scale_format.value)
    return WeightOperand(forward_data, scale), WeightOperand(dgrad_data, scale.transpose(1, 2))


def quantize_weight_for_forward(w: Tensor | Sequence[Tensor], scale_format: ScaleFormat) -> WeightOperand:
    """The first operand of `quantize_weight` alone."""
    scale, data = _quantize_weight(_parts(w), True, False, scale_format.value)
    return WeightOperand(data, scale)


def quantize_weight_for_dgrad(w: Tensor | Sequence[Tensor], scale_format: ScaleFormat) -> WeightOperand:
    """The second operand of `quantize_weight` alone."""
    scale, data = _quantize_weight(_parts(w), False, True, scale_format.value)
    return WeightOperand(data, scale.transpose(1, 2))


def dequantize_rows(rows: RowOperand, groups: TokenGroups, dtype: torch.dtype) -> Tensor:
    """The ragged rows `(M, D)` of a row operand, as well as its codes tell; zeros for rows of no group."""
    return _dequantize_rows(*rows.tensors, groups.num_tokens, groups.tensors, dtype)


def requantize_rows_to_tokens(rows: RowOperand, groups: TokenGroups, layout: TokenLayout) -> TokenOperand:
    """The token operand of a row operand's values, without going back to the high-precision tensor.

    `rows` must have `ScaleFormat.POW2` scales (others would be rounded a second time, and so lose accuracy); so has the
    result.
    """
    stored = _requantize_rows_to_tokens(*rows.tensors, groups.num_tokens, groups.tensors, layout.value)
    return TokenOperand.of(stored, layout)


def _empty_activation_operands(
    x: Tensor, plan: Sequence[Tensor], rows: bool, tokens: str | None, token_tile: int, scale_format: str
) -> tuple[RowOperand | None, TokenOperand | None]:
    capacity = TokenGroups(x.shape[0], *plan).capacity
    return empty_operands(capacity, x.shape[1], rows, TokenLayout(tokens) if tokens else None, x.device, token_tile)


@torch_op(fake=lambda *args, **kwargs: tensors_of(*_empty_activation_operands(*args, **kwargs)))
def _quantize_activation(
    x: Tensor, plan: Sequence[Tensor], rows: bool, tokens: str | None, token_tile: int, scale_format: str
) -> list[Tensor]:
    groups, format_ = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format)
    has_long_tiles = tokens is not None and token_tile > BLOCK
    on_hopper = runs_hopper_kernels(x.device)
    if on_hopper or (runs_triton_fp8(x.device) and not has_long_tiles):
        row_operand, token_operand = _empty_activation_operands(x, plan, rows, tokens, token_tile, scale_format)
        pow2 = format_ is ScaleFormat.POW2
        if token_operand is not None and has_long_tiles:
            from fp8moe.quantize.long_tiles_hopper import launch_quantize_long_tiles_hopper

            launch_quantize_long_tiles_hopper(x, groups, row_operand, token_operand, pow2=pow2)
        elif token_operand is not None and on_hopper:
            from fp8moe.quantize.activations_hopper import launch_quantize_activation_hopper

            launch_quantize_activation_hopper(x, groups, row_operand, token_operand, pow2=pow2)
        else:
            from fp8moe.quantize.activations import launch_quantize_activation

            launch_quantize_activation(x, groups, row_operand, token_operand, pow2=pow2)
        return tensors_of(row_operand, token_operand)
    layout = TokenLayout(tokens) if tokens else None
    return tensors_of(*reference.quantize_operands(x, groups, format_, rows, layout, token_tile))


def _parts(w: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [w] if isinstance(w, Tensor) else list(w)


def _empty_weight_operands(parts: Sequence[Tensor], forward: bool, dgrad: bool, scale_format: str) -> list[Tensor]:
    num_experts, _, k = parts[0].shape
    n = sum(part.shape[1] for part in parts)
    operands = [parts[0].new_empty((num_experts, n // BLOCK, k // BLOCK), dtype=torch.float32)]
    if forward:
        operands.append(parts[0].new_empty((num_experts, n, k), dtype=torch.float8_e4m3fn))
    if dgrad:
        operands.append(parts[0].new_empty((num_experts, k, n), dtype=torch.float8_e4m3fn))
    return operands


@torch_op(fake=_empty_weight_operands)
def _quantize_weight(parts: Sequence[Tensor], forward: bool, dgrad: bool, scale_format: str) -> list[Tensor]:
    operands = _empty_weight_operands(parts, forward, dgrad, scale_format)
    scale, forward_data, dgrad_data = operands[0], operands[1] if forward else None, operands[-1] if dgrad else None
    if len(parts) == 1:
        quantize_weight_into(parts[0], ScaleFormat(scale_format), scale, forward_data, dgrad_data)
        return operands
    start = 0
    for part in parts:
        n = part.shape[1]
        quantize_weight_into(
            part,
            ScaleFormat(scale_format),
            scale.narrow(1, start // BLOCK, n // BLOCK),
            None if forward_data is None else forward_data.narrow(1, start, n),
            None if dgrad_data is None else dgrad_data.narrow(2, start, n),
        )
        start += n
    return operands


def quantize_weight_into(
    w: Tensor, scale_format: ScaleFormat, scale: Tensor, forward_data: Tensor | None, dgrad_data: Tensor | None
) -> None:
    """`quantize_weight` into memory that is there, and no operator: for use within operators.

    Args:
        w, scale_format: as in `quantize_weight`.
        scale: fp32 `(E, N/128, K/128)`.
        forward_data, dgrad_data: e4m3 `(E, N, K)` and `(E, K, N)`; what is None is not made. Of these and of `scale`
            the last dimension is contiguous.
    """
    if runs_triton_fp8(w.device):
        from fp8moe.quantize.weights import launch_quantize_weight

        launch_quantize_weight(w, forward_data, dgrad_data, scale, pow2=scale_format is ScaleFormat.POW2)
        return
    forward_operand, dgrad_operand = reference.quantize_weight(w, scale_format)
    scale.copy_(forward_operand.scale)
    for data, operand in ((forward_data, forward_operand), (dgrad_data, dgrad_operand)):
        if data is not None:
            data.copy_(operand.data)


def _empty_token_operand(
    row_data: Tensor, row_scale: Tensor, num_tokens: int, plan: Sequence[Tensor], layout: str
) -> TokenOperand:
    capacity, num_features = row_data.shape
    return TokenOperand.empty(capacity, num_features, TokenLayout(layout), row_data.device)


@torch_op(fake=lambda *args, **kwargs: tensors_of(_empty_token_operand(*args, **kwargs)))
def _requantize_rows_to_tokens(
    row_data: Tensor, row_scale: Tensor, num_tokens: int, plan: Sequence[Tensor], layout: str
) -> list[Tensor]:
    rows, groups = RowOperand(row_data, row_scale), TokenGroups(num_tokens, *plan)
    if runs_triton_fp8(row_data.device):
        from fp8moe.quantize.requantize import launch_requantize_rows_to_tokens

        tokens = _empty_token_operand(row_data, row_scale, num_tokens, plan, layout)
        launch_requantize_rows_to_tokens(rows, groups, tokens)
    else:
        tokens = reference.requantize_rows_to_tokens(rows, groups, TokenLayout(layout))
    return [*tokens.tensors]


def _empty_ragged_rows(
    row_data: Tensor, row_scale: Tensor, num_tokens: int, plan: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    return row_data.new_empty((num_tokens, row_data.shape[1]), dtype=dtype)


@torch_op(fake=_empty_ragged_rows)
def _dequantize_rows(
    row_data: Tensor, row_scale: Tensor, num_tokens: int, plan: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    rows, groups = RowOperand(row_data, row_scale), TokenGroups(num_tokens, *plan)
    out = _empty_ragged_rows(row_data, row_scale, num_tokens, plan, dtype)
    if runs_triton_fp8(row_data.device):
        from fp8moe.quantize.dequantize import launch_dequantize_rows

        launch_dequantize_rows(rows, groups, out)
        return out
    padding = (groups.token_row < 0)[:, None]
    return out.copy_(reference.dequantize_rows(rows)[groups.token_row.clamp(min=0)].masked_fill(padding, 0.0))
