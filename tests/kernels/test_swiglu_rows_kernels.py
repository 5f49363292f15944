"""The kernel behind `swiglu_quantize`: every group size, scale layout and scale format."""

import pytest
import torch
from torch import Tensor

from fp8moe import ScaleFormat, ScaleLayout, pack_ue8m0, swiglu_quantize
from fp8moe.gate import SWIGLU, GatedActivation
from fp8moe.kernels.swiglu_forward import launch_quantize_swiglu
from fp8moe.kernels.swiglu_quantize import launch_quantize_swiglu_rows
from fp8moe.quantize import reference, swiglu_reference
from fp8moe.quantize.swiglu_quantize import GateUpLayout
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, offsets, values
from tests.kernels.support import device_activation
from tests.kernels.test_quantize_kernels import poison, poisoned_rows
from tests.measures import assert_same_bits
from tests.swiglu_tolerance import Tiles, assert_near, plain

LAYOUTS = ("row-major", "column-major", "column-major, aligned")


def poisoned_scale(num_rows: int, columns: int, dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """`(rows, columns)` in a layout, with what must not be written around it."""
    if layout == "row-major":
        scale = torch.empty(num_rows, columns, dtype=dtype, device=device)
    else:
        column = num_rows if layout == "column-major" else -(-num_rows // 4) * 4
        scale = torch.empty(columns, column, dtype=dtype, device=device).t()[:num_rows]
    poison(scale)
    return scale


def run(
    x: Tensor, group_size: int, *, layout: str = "row-major", pow2: bool = False, packed: bool = False,
    row_weights: Tensor | None = None, halves: GateUpLayout = GateUpLayout.GATE_UP, rounded: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_rows, num_features = x.shape[0], x.shape[1] // 2
    columns = num_features // group_size
    data = torch.empty(num_rows, num_features, dtype=torch.float8_e4m3fn, device=x.device)
    dtype = torch.int32 if packed else torch.float32
    scale = poisoned_scale(num_rows, -(-columns // 4) if packed else columns, dtype, layout, x.device)
    poison(data)
    if packed:
        scale.zero_()  # the bytes of no group are the caller's
    gate_start, up_start = halves.starts(num_features)
    launch_quantize_swiglu_rows(
        x, data, scale,
        gate_start=gate_start, up_start=up_start, group_size=group_size, row_weights=row_weights, pow2=pow2,
        round_through_bf16=rounded, gate=SWIGLU,
    )  # fmt: skip
    return data, scale


@pytest.mark.parametrize("group_size", [32, 96, 128, 320])
@pytest.mark.parametrize("scale_format", ScaleFormat)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_near_its_definition(
    device: torch.device, group_size: int, scale_format: ScaleFormat, dtype: torch.dtype
) -> None:
    for num_rows, kind, halves in ((5, "normal", GateUpLayout.UP_GATE), (127, "nan", GateUpLayout.GATE_UP)):
        x = values(kind, (num_rows, 2 * 3 * group_size), dtype, 0).to(device)
        row_weights = torch.rand(num_rows, device=device)
        data, scale = run(x, group_size, pow2=scale_format is ScaleFormat.POW2, row_weights=row_weights, halves=halves)
        act = swiglu_reference.swiglu(halves.gate_first(x), row_weights).view(-1, group_size)
        assert_near(Tiles(data.view(-1, group_size), scale.flatten(), act, plain(act)), scale_format)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 127, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_layouts_and_packing_hold_the_same_numbers(device: torch.device, num_rows: int, layout: str) -> None:
    for num_features in (160, 256):  # 5 groups, the last word ragged, and 8
        x = torch.randn(num_rows, 2 * num_features, device=device)
        data, scale = run(x, 32, pow2=True)
        other_data, other_scale = run(x, 32, pow2=True, layout=layout)
        packed_data, packed_scale = run(x, 32, pow2=True, layout=layout, packed=True)
        assert_same_bits(other_data, data)
        assert_same_bits(other_scale, scale)
        assert_same_bits(packed_data, data)
        assert_same_bits(packed_scale, pack_ue8m0(scale))


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_groups_of_128_are_the_row_operand(device: torch.device, scale_format: ScaleFormat) -> None:
    x, row_weights = torch.randn(128, 512).bfloat16().to(device), torch.rand(128).bfloat16().to(device)
    groups, pow2 = plan_groups(offsets([128], device), 128), scale_format is ScaleFormat.POW2
    rows = poisoned_rows(groups, 256, device)
    launch_quantize_swiglu(x, groups, rows, None, row_weights=row_weights, pow2=pow2, act=GatedActivation(256, SWIGLU))
    rounded = reference.quantize_rows(device_activation(x, row_weights).bfloat16(), groups, scale_format)
    for expected, is_rounded in ((rows, False), (rounded, True)):
        data, scale = run(x, 128, pow2=pow2, row_weights=row_weights, rounded=is_rounded)
        assert_same_bits(data, expected.data)
        assert_same_bits(scale, expected.scale)


def test_any_row_stride(device: torch.device) -> None:
    wide = torch.randn(40, 700, device=device)
    x = wide[::2, 30:670]
    for actual, expected in zip(run(x, 64), run(x.contiguous(), 64), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [0, 1, 3, 5, 127, 128, 65535, 65536, 131072])
@pytest.mark.parametrize("group_size", [32, 96, 128, 320])
@pytest.mark.parametrize("layout", ScaleLayout)
def test_public_function_on_cuda(num_rows: int, group_size: int, layout: ScaleLayout) -> None:
    x = torch.randn(num_rows, 2 * 3 * group_size, device="cuda").bfloat16()
    row_weights = torch.rand(num_rows, device="cuda")
    for scale_format in ScaleFormat:
        out = swiglu_quantize(
            x, group_size=group_size, scale_format=scale_format, scale_layout=layout, row_weights=row_weights
        )
        act = swiglu_reference.swiglu(x, row_weights).view(-1, group_size)
        assert_near(Tiles(out.data.view(-1, group_size), out.scale.flatten(), act, plain(act)), scale_format)
    packed = swiglu_quantize(
        x, group_size=group_size, scale_format=ScaleFormat.POW2, packed_ue8m0=True, scale_layout=layout,
        row_weights=row_weights,
    )  # fmt: skip
    assert_same_bits(packed.scale, pack_ue8m0(out.scale))
