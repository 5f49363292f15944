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


def _empty_rows(x: Tensor, plan: Sequence[Tensor], choice_row: Tensor, scale_format: str) -> list[Tensor]:
    return tensors_of(RowOperand.empty(TokenGroups(choice_row.numel(), *plan).capacity, x.shape[1], x.device))


@torch_op(fake=_empty_rows)
def _spread_rows(x: Tensor, plan: Sequence[Tensor], choice_row: Tensor, scale_format: str) -> list[Tensor]:
    groups, format_ = TokenGroups(choice_row.numel(), *plan), ScaleFormat(scale_format)
    if x.shape[1] > 1 and runs_triton_fp8(x.device):  # see `missing_for_sizes` of TritonGemm
        from fp8moe.kernels.spread_rows import launch_spread_rows

        rows = RowOperand(*_empty_rows(x, plan, choice_row, scale_format))
        launch_spread_rows(x, choice_row.contiguous(), groups, rows, pow2=format_ is ScaleFormat.POW2)
        return tensors_of(rows)
    return tensors_of(reference.quantize_rows(x, groups, format_))
