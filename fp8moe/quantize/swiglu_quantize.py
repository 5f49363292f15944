"""`swiglu_quantize`: SwiGLU and quantization of rows as they are, in the scale layouts that kernels of others take."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fp8moe.checks import check_device, check_float, check_same_device, check_tensors
from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_triton_fp8
from fp8moe.gate import SWIGLU
from fp8moe.quantize import swiglu_reference
from fp8moe.quantize.swiglu_forward import neighbours_contiguous
from fp8moe.quantize.ue8m0 import pack_ue8m0
from fp8moe.torch_op import torch_op

MIN_GROUP_SIZE = 32
TMA_ROWS = 4
"""A column of scales that TMA loads starts at a multiple of 16 bytes: of 4 scales or packed words."""


class GateUpLayout(Enum):
    """Which half of the features `(rows, 2I)` is the gate."""

    GATE_UP = "gate_up"
    UP_GATE = "up_gate"

    def starts(self, num_features: int) -> tuple[int, int]:
        """The first column of the gate and of the up-projection, `num_features` (`I`) columns each."""
        return (0, num_features) if self is GateUpLayout.GATE_UP else (num_features, 0)

    def gate_first(self, x: Tensor) -> Tensor:
        """`x` as the definition takes it."""
        return x if self is GateUpLayout.GATE_UP else x.roll(x.shape[1] // 2, 1)


LAYOUTS = tuple(member.value for member in GateUpLayout)
"""By name: torch 2.11 traces no iteration over an enum."""


class ScaleLayout(Enum):
    """How the scales `(rows, columns)` lie in memory."""

    ROW_MAJOR = "row-major"
    """Strides `(columns, 1)`."""
    COLUMN_MAJOR = "column-major"
    """Strides `(1, rows)`."""
    COLUMN_MAJOR_TMA = "column-major, aligned for TMA"
    """Strides `(1, rows rounded up to a multiple of 4)`; what lies between columns is unspecified."""


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """What `swiglu_quantize` returns."""

    data: Tensor
    """e4m3 `(rows, I)`, row-major."""
    scale: Tensor
    """fp32 `(rows, groups)`, or int32 `(rows, ceil(groups / 4))` of packed UE8M0, in the layout asked for."""


def swiglu_quantize(
    x: Tensor,
    *,
    layout: str = "gate_up",
    group_size: int = 128,
    scale_format: ScaleFormat = ScaleFormat.FP32,
    packed_ue8m0: bool = False,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    row_weights: Tensor | None = None,
    round_through_bf16: bool = False,
) -> QuantizedActivation:
    """`gate * sigmoid(gate) * up`, times the row's weight, quantized to e4m3 in groups of features, in one pass.

    The arithmetic is in fp32. A group with NaN or infinity becomes NaN as a whole, and no other does. No gradient flows
    through it.

    Args:
        x: bf16, fp16 or fp32 `(rows, 2I)` on a CPU or GPU; any row stride (other features are copied first).
        layout: "gate_up" if the gate is the first half of the features, "up_gate" if it is the second.
        group_size: features that share a scale; at least 32, a divisor of `I`.
        scale_format: as in `FP8Config`.
        packed_ue8m0: give the scales as their exponents, four to an int32 (see `pack_ue8m0`); for `ScaleFormat.POW2`.
        scale_layout: how the scales lie in memory.
        row_weights: bf16, fp16 or fp32 `(rows,)`.
        round_through_bf16: round the activation to bf16 first, for the bits of one that was stored so.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit each other.
    """
    _check(x, layout, group_size, scale_format, packed_ue8m0, scale_layout, row_weights, round_through_bf16)
    data, scale = _swiglu_quantize(
        x.detach(),
        None if row_weights is None else row_weights.detach(),
        group_size, packed_ue8m0, scale_layout.value, layout, scale_format.value, round_through_bf16,
    )  # fmt: skip
    return QuantizedActivation(data, _logical_scale(scale, x.shape[0], scale_layout))


def _logical_scale(stored: Tensor, num_rows: int, layout: ScaleLayout) -> Tensor:
    """`(rows, columns)`, seen in a scale as it is stored."""
    return stored if layout is ScaleLayout.ROW_MAJOR else stored.t()[:num_rows]


def _empty_operands(
    x: Tensor, row_weights: Tensor | None, group_size: int, packed_ue8m0: bool, scale_layout: str, *options: object
) -> list[Tensor]:
    num_rows, num_features = x.shape[0], x.shape[1] // 2
    num_groups = num_features // group_size
    columns, dtype = (-(-num_groups // 4), torch.int32) if packed_ue8m0 else (num_groups, torch.float32)
    shape = {
        ScaleLayout.ROW_MAJOR: (num_rows, columns),
        ScaleLayout.COLUMN_MAJOR: (columns, num_rows),
        ScaleLayout.COLUMN_MAJOR_TMA: (columns, -(-num_rows // TMA_ROWS) * TMA_ROWS),
    }[ScaleLayout(scale_layout)]
    # The kernel writes the bytes of the groups: those that a row's last word has beyond them are zero already.
    scale = x.new_zeros(shape, dtype=dtype) if packed_ue8m0 and num_groups % 4 else x.new_empty(shape, dtype=dtype)
    return [x.new_empty((num_rows, num_features), dtype=torch.float8_e4m3fn), scale]


@torch_op(fake=_empty_operands)
def _swiglu_quantize(
    x: Tensor,
    row_weights: Tensor | None,
    group_size: int,
    packed_ue8m0: bool,
    scale_layout: str,
    layout: str,
    scale_format: str,
    round_through_bf16: bool,
) -> list[Tensor]:
    halves, format_ = GateUpLayout(layout), ScaleFormat(scale_format)
    data, stored = _empty_operands(x, row_weights, group_size, packed_ue8m0, scale_layout)
    scale = _logical_scale(stored, x.shape[0], ScaleLayout(scale_layout))
    if runs_triton_fp8(x.device):
        from fp8moe.kernels.swiglu_quantize import launch_quantize_swiglu_rows

        features, weights = neighbours_contiguous(x, row_weights)
        gate_start, up_start = halves.starts(data.shape[1])
        launch_quantize_swiglu_rows(
            features, data, scale,
            gate_start=gate_start, up_start=up_start, group_size=group_size, row_weights=weights,
            pow2=format_ is ScaleFormat.POW2, round_through_bf16=round_through_bf16, gate=SWIGLU,
        )  # fmt: skip
        return [data, stored]
    act = swiglu_reference.swiglu(halves.gate_first(x), row_weights)
    if round_through_bf16:
        act = act.bfloat16().float()
    codes, scales = swiglu_reference.quantize_in_groups(act, group_size, format_)
    data.copy_(codes)
    scale.copy_(pack_ue8m0(scales) if packed_ue8m0 else scales)
    return [data, stored]


def _check(
    x: Tensor,
    layout: str,
    group_size: int,
    scale_format: ScaleFormat,
    packed_ue8m0: bool,
    scale_layout: ScaleLayout,
    row_weights: Tensor | None,
    round_through_bf16: bool,
) -> None:
    tensors = {"x": x} if row_weights is None else {"x": x, "row_weights": row_weights}
    check_tensors(tensors)
    for name, tensor in tensors.items():
        check_float(tensor, name)
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be 2D, (rows, 2I): gate and up side by side")
    check_device(x, "x")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be 'gate_up' or 'up_gate'")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size is {group_size!r}; it must be an int")
    num_features = x.shape[1] // 2
    if group_size < MIN_GROUP_SIZE or num_features % group_size:
        raise ValueError(
            f"group_size is {group_size}; it must be at least {MIN_GROUP_SIZE} and divide the {num_features} features "
            "of the activation (half of x's)"
        )
    for name, option, kind in (
        ("scale_format", scale_format, ScaleFormat),
        ("scale_layout", scale_layout, ScaleLayout),
        ("packed_ue8m0", packed_ue8m0, bool),
        ("round_through_bf16", round_through_bf16, bool),
    ):
        if not isinstance(option, kind):
            raise TypeError(f"{name} is {option!r}; it must be a {kind.__name__}")
    if packed_ue8m0 and scale_format is not ScaleFormat.POW2:
        raise ValueError(f"packed_ue8m0 needs powers of two and scale_format is {scale_format}; pass ScaleFormat.POW2")
    if row_weights is not None:
        if row_weights.shape != x.shape[:1]:
            raise ValueError(
                f"row_weights has shape {tuple(row_weights.shape)}; it must be ({x.shape[0]},): one for each row of x"
            )
        check_same_device(row_weights, "row_weights", x, "x")
