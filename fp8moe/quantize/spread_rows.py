"""The row operand of tokens that several experts may choose."""

from collections.abc import Sequence

from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_triton_fp8
from fp8moe.operands import RowOperand, TokenGroups, tensors_of
from fp8moe.quantize import reference
from fp8moe.torch_op import torch_op


def quantize_and_spread_rows(
    x: Tensor, groups: TokenGroups, choice_row: Tensor, scale_format: ScaleFormat
) -> RowOperand:
    """The bits of `quantize_rows`, where each token is read and quantized once, whatever the number of its rows.

    Args:
        x: bf16, fp16 or fp32 `(T, D)`, any strides.
        groups: the plan of the rows, gathering from the tokens: `routing.groups.gathering(routing.row_token)`.
        choice_row: int32 `(T, k)` of the same routing.
        scale_format: as in `FP8Config`.

    Returns:
        `(R, D)`, `D` up to a multiple of 128.
    """
    return RowOperand(*_spread_rows(x, groups.tensors, choice_row, scale_format.value))


def spread_codes(codes: Tensor, scale: Tensor, groups: TokenGroups, choice_row: Tensor) -> RowOperand:
    """The row operand of tokens that are quantized already: their codes and scales as they are.

    Args:
        codes: e4m3 `(T, D)`, `D` a multiple of 128, any strides.
        scale: fp32 `(T, D/128)`; contiguous in a token.
        groups, choice_row: as in `quantize_and_spread_rows`.
    """
    return RowOperand(*_spread_rows(codes, groups.tensors, choice_row, ScaleFormat.POW2.value, scale))


def _empty_rows(
    x: Tensor, plan: Sequence[Tensor], choice_row: Tensor, scale_format: str, x_scale: Tensor | None = None
) -> list[Tensor]:
    return tensors_of(RowOperand.empty(TokenGroups(choice_row.numel(), *plan).capacity, x.shape[1], x.device))


@torch_op(fake=_empty_rows)
def _spread_rows(
    x: Tensor, plan: Sequence[Tensor], choice_row: Tensor, scale_format: str, x_scale: Tensor | None = None
) -> list[Tensor]:
    groups, format_ = TokenGroups(choice_row.numel(), *plan), ScaleFormat(scale_format)
    if x.shape[1] > 1 and runs_triton_fp8(x.device):  # see `missing_for_sizes` of TritonGemm
        from fp8moe.kernels.spread_rows import launch_spread_rows

        rows = RowOperand(*_empty_rows(x, plan, choice_row, scale_format))
        launch_spread_rows(x, choice_row.contiguous(), groups, rows, pow2=format_ is ScaleFormat.POW2, x_scale=x_scale)
        return tensors_of(rows)
    if x_scale is not None:
        return tensors_of(reference.gather_codes(x, x_scale, groups))
    return tensors_of(reference.quantize_rows(x, groups, format_))
