"""Activations and gradients to row and token operands.

The operators in this folder take and return plain contiguous tensors (scales as they are stored), because a compiler's
fake tensors can promise no more. The functions around them take and return operand types.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_hopper_kernels, runs_triton_fp8
from fp8moe.operands import (
    BLOCK,
    RowOperand,
    TokenGroups,
    TokenLayout,
    TokenOperand,
    empty_operands,
    tensors_of,
)
from fp8moe.quantize import reference
from fp8moe.torch_op import torch_op


def quantize_operands(
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    *,
    rows: bool,
    tokens: TokenLayout | None,
    token_tile: int = BLOCK,
) -> tuple[RowOperand | None, TokenOperand | None]:
    """Quantize ragged rows in one read, padding each group to a multiple of 128 rows in the same pass.

    Args:
        x: bf16, fp16 or fp32 `(M, D)`, any strides.
        groups: the plan for these `M` rows.
        scale_format: as in `FP8Config`.
        rows: whether to make the row operand `(R, D)`, quantized along the features, `D` up to a multiple of 128.
        tokens: the layout of the token operand `(D, R)`, quantized along the tokens of each group; None makes none.
        token_tile: of the token operand.
    """
    stored = _quantize_activation(x, groups.tensors, rows, tokens and tokens.value, token_tile, scale_format.value)
    return (
        RowOperand(*stored[:2]) if rows else None,
        TokenOperand.of(stored[-2:], tokens, token_tile) if tokens else None,
    )


def quantize_rows(x: Tensor, groups: TokenGroups, scale_format: ScaleFormat) -> RowOperand:
    """The row operand of `quantize_operands` alone."""
    rows, _ = quantize_operands(x, groups, scale_format, rows=True, tokens=None)
    return cast(RowOperand, rows)


def quantize_tokens(
    x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout, token_tile: int = BLOCK
) -> TokenOperand:
    """The token operand of `quantize_operands` alone."""
    _, tokens = quantize_operands(x, groups, scale_format, rows=False, tokens=layout, token_tile=token_tile)
    return cast(TokenOperand, tokens)


def requantize_tokens(
    codes: Tensor, scale: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout,
    token_tile: int = BLOCK,
) -> TokenOperand:  # fmt: skip
    """The token operand of values that are codes already, in tiles along their features.

    Where both scales are powers of two, it stands for the same values, but for those below the normal numbers of e4m3
    in their new tile, which round once more.

    Args:
        codes: e4m3 `(M, D)`, any strides.
        scale: fp32 `(M, D/128)`, rounded up: of each 128 features of a row.
        groups, scale_format, layout, token_tile: as in `quantize_operands`.
    """
    made = _quantize_activation(codes, groups.tensors, False, layout.value, token_tile, scale_format.value, scale)
    return TokenOperand.of(made, layout, token_tile)


def quantize_rows_and_tokens(
    x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout, token_tile: int = BLOCK
) -> tuple[RowOperand, TokenOperand]:
    """Both operands of `quantize_operands`."""
    operands = quantize_operands(x, groups, scale_format, rows=True, tokens=layout, token_tile=token_tile)
    return cast(tuple[RowOperand, TokenOperand], operands)


def _empty_activation_operands(
    x: Tensor, plan: Sequence[Tensor], rows: bool, tokens: str | None, token_tile: int, scale_format: str,
    x_scale: Tensor | None = None,
) -> tuple[RowOperand | None, TokenOperand | None]:  # fmt: skip
    capacity = TokenGroups(x.shape[0], *plan).capacity
    return empty_operands(capacity, x.shape[1], rows, TokenLayout(tokens) if tokens else None, x.device, token_tile)


@torch_op(fake=lambda *args, **kwargs: tensors_of(*_empty_activation_operands(*args, **kwargs)))
def _quantize_activation(
    x: Tensor, plan: Sequence[Tensor], rows: bool, tokens: str | None, token_tile: int, scale_format: str,
    x_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    groups, format_ = TokenGroups(x.shape[0], *plan), ScaleFormat(scale_format)
    has_long_tiles = tokens is not None and token_tile > BLOCK
    on_hopper = runs_hopper_kernels(x.device)
    if x.shape[1] > 1 and (
        on_hopper or (runs_triton_fp8(x.device) and not has_long_tiles)
    ):  # see `missing_for_sizes` of TritonGemm
        row_operand, token_operand = _empty_activation_operands(x, plan, rows, tokens, token_tile, scale_format)
        pow2 = format_ is ScaleFormat.POW2
        if token_operand is not None and has_long_tiles:
            from fp8moe.kernels.sm90.long_tiles import launch_quantize_long_tiles_hopper

            launch_quantize_long_tiles_hopper(x, groups, row_operand, token_operand, pow2=pow2, x_scale=x_scale)
        elif token_operand is not None and on_hopper:
            from fp8moe.kernels.sm90.activations import launch_quantize_activation_hopper

            launch_quantize_activation_hopper(x, groups, row_operand, token_operand, pow2=pow2, x_scale=x_scale)
        else:
            from fp8moe.kernels.activations import launch_quantize_activation

            launch_quantize_activation(x, groups, row_operand, token_operand, pow2=pow2, x_scale=x_scale)
        return tensors_of(row_operand, token_operand)
    layout = TokenLayout(tokens) if tokens else None
    x = x if x_scale is None else reference.dequantize_codes(x, x_scale)
    return tensors_of(*reference.quantize_operands(x, groups, format_, rows, layout, token_tile))
