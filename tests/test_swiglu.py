"""SwiGLU and quantization in one: the definition against autograd, the operators and `swiglu_quantize` on a CPU."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fp8moe
from fp8moe import ScaleFormat, ScaleLayout, pack_ue8m0, swiglu_quantize, unpack_ue8m0
from fp8moe.gate import Gate, GatedActivation
from fp8moe.operands import TokenLayout
from fp8moe.quantize import gated, reference, swiglu_reference
from fp8moe.quantize.swiglu_backward import quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import quantize_swiglu, quantize_swiglu_forward
from fp8moe.rows.groups import plan_groups
from tests.generators import offsets
from tests.measures import assert_same_bits, sqnr

ROW_COUNTS = (0, 1, 3, 5, 127, 128, 65535, 65536, 131072)


def by_autograd(x: Tensor, d_act: Tensor, row_weights: Tensor) -> tuple[Tensor, ...]:
    """The activation and the gradients of `x` and `row_weights`, in fp64, by PyTorch's own SiLU."""
    leaves = [x.double().requires_grad_(), row_weights.double().requires_grad_()]
    gate, up = leaves[0].chunk(2, dim=1)
    act = F.silu(gate) * up * leaves[1][:, None]
    return act, *torch.autograd.grad(act, leaves, d_act.double())


FORMULAS: dict[Gate, Callable[[Tensor, Tensor], Tensor]] = {
    Gate.swiglu(): lambda g, u: F.silu(g) * u,
    Gate.clamped_swiglu(2.0): lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0),
    Gate.clamped_swiglu(2.0, 1.702, 1.0): lambda g, u: (
        g.clamp(max=2.0) * torch.sigmoid(1.702 * g.clamp(max=2.0)) * (u.clamp(-2.0, 2.0) + 1)
    ),
    Gate.clamped_swiglu(math.inf, 0.5): lambda g, u: g * torch.sigmoid(0.5 * g) * u,
    Gate.post_clamped_swiglu(1.5): lambda g, u: F.silu(g).clamp(max=1.5) * u.clamp(-1.5, 1.5),
    Gate.geglu_tanh(): lambda g, u: F.gelu(g, approximate="tanh") * u,
    Gate.relu_squared(): lambda _, u: F.relu(u).square(),
}


@pytest.mark.parametrize("gate", FORMULAS, ids=lambda gate: gate.code)
def test_a_gate_has_the_values_and_gradients_of_its_formula(gate: Gate) -> None:
    g, u, d_act = ((torch.randn(40, 256) * 3).double() for _ in range(3))
    for tensor in (g, u):  # what clamps do at their limits
        tensor[0, :6] = torch.tensor([2.0, -2.0, 1.5, -1.5, 0.0, 40.0])
    leaves = [g.requires_grad_(), u.requires_grad_()]
    act = FORMULAS[gate](g, u)
    expected = torch.autograd.grad(act, leaves, d_act, allow_unused=True)
    assert act.abs().sum() > 0
    first = g if gate.has_gate else None
    torch.testing.assert_close(gated.activation(gate, first, u), act)
    for actual, of_autograd in zip(gated.gradients(gate, d_act, first, u), expected, strict=True):
        assert (actual is None) == (of_autograd is None)
        if actual is not None:
            torch.testing.assert_close(actual, of_autograd)


@pytest.mark.parametrize("gate", FORMULAS, ids=lambda gate: gate.code)
def test_gates_keep_nan_and_make_zeros_of_zeros(gate: Gate) -> None:
    """Padded features are zeros, whatever is added to up."""
    zeros, ones, nan = torch.zeros(3), torch.ones(3), torch.full((3,), torch.nan)
    assert (gated.activation(gate, zeros if gate.has_gate else None, zeros) == 0).all()
    for gradient in gated.gradients(gate, zeros, ones if gate.has_gate else None, ones):
        assert gradient is None or (gradient == 0).all()
    if gate.has_gate:
        assert gated.activation(gate, nan, ones).isnan().all()
        assert torch.stack([t for t in gated.gradients(gate, ones, nan, ones) if t is not None]).isnan().all()
    assert gated.activation(gate, ones if gate.has_gate else None, nan).isnan().all()


def test_codes_of_gates() -> None:
    assert len({gate.code for gate in FORMULAS}) == len(FORMULAS)
    for gate in FORMULAS:
        assert Gate.of_code(gate.code) == gate


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_of_a_bias_stays_with_its_expert(autocast: bool) -> None:
    x, d_act = torch.randn(300, 256), torch.randn(300, 128)
    x[7, 3] = torch.nan
    groups, bias = plan_groups(offsets([100, 0, 170]), 300), torch.randn(3, 256)
    act = GatedActivation(128, Gate.clamped_swiglu(7.0, 1.702, 1.0), bias, interleaved=True)
    with torch.autocast("cpu", enabled=autocast):
        made = quantize_swiglu_backward(d_act, x, groups, ScaleFormat.FP32, act=act, d_bias=True)
    leaf = bias[2].double().requires_grad_()
    gate, up = x[100:270].double().chunk(2, dim=1)
    gate, up = (gate + leaf[::2]).clamp(max=7.0), (up + leaf[1::2]).clamp(-7.0, 7.0)
    out = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    (expected,) = torch.autograd.grad(out, leaf, d_act[100:270].double())
    assert made.d_bias is not None
    assert made.d_bias.dtype == torch.float32
    assert made.d_bias[0].isnan().any()
    assert (made.d_bias[1] == 0).all()
    assert sqnr(made.d_bias[2], expected) > 110


def test_definition_equals_autograd() -> None:
    x, d_act, row_weights = torch.randn(40, 512) * 3, torch.randn(40, 256), torch.rand(40)
    act, d_x, d_row_weights = by_autograd(x, d_act, row_weights)
    assert sqnr(swiglu_reference.swiglu(x, row_weights), act) > 130
    actual_d_x, actual_d_row_weights = swiglu_reference.swiglu_backward(d_act, x, row_weights)
    assert sqnr(actual_d_x, d_x) > 130
    assert sqnr(actual_d_row_weights, d_row_weights) > 120


@pytest.mark.parametrize("layout", TokenLayout)
def test_operators_hold_what_autograd_computes(layout: TokenLayout) -> None:
    x, d_act, row_weights = torch.randn(303, 512), torch.randn(303, 256), torch.rand(303)
    groups = plan_groups(offsets([100, 0, 200]), 303)
    at = groups.token_row[:300].long()
    act, d_x, d_row_weights = (t[:300].detach() for t in by_autograd(x, d_act, row_weights))
    rows, tokens = quantize_swiglu(x, groups, ScaleFormat.FP32, tokens=layout, row_weights=row_weights)
    gradients = quantize_swiglu_backward(
        d_act, x, groups, ScaleFormat.FP32, d_row_weights=True, layout=layout, row_weights=row_weights
    )
    assert rows
    assert tokens
    assert gradients.d_x_rows
    assert gradients.d_x_tokens
    assert gradients.act_tokens
    assert gradients.d_row_weights is not None
    assert sqnr(reference.dequantize_rows(rows)[at], act) > 28
    assert sqnr(reference.dequantize_tokens(tokens, groups).t()[at], act) > 28
    assert sqnr(reference.dequantize_rows(gradients.d_x_rows)[at], d_x) > 28
    assert sqnr(reference.dequantize_tokens(gradients.d_x_tokens, groups).t()[at], d_x) > 28
    assert_same_bits(gradients.act_tokens.data, tokens.data)
    assert sqnr(gradients.d_row_weights.sum(0)[:300], d_row_weights) > 120


def test_operators_make_only_what_is_asked_for() -> None:
    x, d_act = torch.randn(200, 256), torch.randn(200, 128)
    groups = plan_groups(offsets([70, 130]), 200)
    every = quantize_swiglu_backward(d_act, x, groups, ScaleFormat.POW2, d_row_weights=True)
    names = ("d_x_rows", "d_x_tokens", "act_tokens", "d_row_weights")
    for name in names:
        only: dict[str, Any] = {other: other == name for other in names}
        made = quantize_swiglu_backward(d_act, x, groups, ScaleFormat.POW2, **only)
        assert [getattr(made, other) is not None for other in names] == [other == name for other in names]
        one, same = getattr(made, name), getattr(every, name)
        assert_same_bits(*((one, same) if name == "d_row_weights" else (one.data, same.data)))
    rows, no_tokens = quantize_swiglu(x, groups, ScaleFormat.POW2)
    no_rows, tokens = quantize_swiglu(x, groups, ScaleFormat.POW2, rows=False, tokens=TokenLayout.PER_EXPERT)
    assert rows
    assert tokens
    assert no_tokens is None
    assert no_rows is None


@pytest.mark.parametrize("bias", [None, torch.randn(3, 512)], ids=["no bias", "bias"])
def test_gate_and_up_that_are_stored_quantized_are_read_as_bf16(bias: Tensor | None) -> None:
    sizes = [130, 0, 60]
    x, d_act, row_weights = torch.randn(200, 512) * 3, torch.randn(200, 256), torch.rand(200)
    groups, act = plan_groups(offsets(sizes), 200), GatedActivation(256, Gate.clamped_swiglu(2.0), bias)
    stored = reference.quantize_rows(x, groups, ScaleFormat.FP32)
    values = torch.zeros(200, 512, dtype=torch.bfloat16)
    values[:190] = reference.dequantize_rows(stored)[groups.token_row[:190].long()].bfloat16()
    options: dict[str, Any] = {"row_weights": row_weights, "act": act}
    wanted: dict[str, Any] = {"d_row_weights": True, "d_bias": bias is not None}
    one, other = (
        quantize_swiglu_backward(d_act, each, groups, ScaleFormat.POW2, **wanted, **options)
        for each in (stored, values)
    )
    for name in ("d_x_rows", "d_x_tokens", "act_tokens"):
        for actual, expected in zip(getattr(one, name).tensors, getattr(other, name).tensors, strict=True):
            assert_same_bits(actual, expected)
    assert one.d_row_weights is not None
    assert other.d_row_weights is not None
    assert_same_bits(one.d_row_weights, other.d_row_weights)
    assert (one.d_row_weights != 0).sum() > 180
    (rows, tokens), (same_rows, same_tokens) = (
        quantize_swiglu(each, groups, ScaleFormat.POW2, tokens=TokenLayout.PER_EXPERT, **options)
        for each in (stored, values)
    )
    assert rows
    assert same_rows
    assert tokens
    assert same_tokens
    assert_same_bits(rows.data, same_rows.data)
    assert_same_bits(tokens.data, same_tokens.data)


@pytest.mark.parametrize("token_tile", [256, 512])
@pytest.mark.parametrize("layout", TokenLayout)
@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_long_tiles_are_those_of_the_activation(
    token_tile: int, layout: TokenLayout, scale_format: ScaleFormat
) -> None:
    sizes = [0, 1, 127, 128, 129, 300, 700]
    x, d_act, row_weights = torch.randn(sum(sizes) + 3, 256), torch.randn(sum(sizes) + 3, 128), torch.rand(1388)
    x[150], x[300, 7], x[700:1000] = torch.inf, torch.nan, 0.0
    groups = plan_groups(offsets(sizes), len(x))
    options: dict[str, Any] = {"row_weights": row_weights}
    act = swiglu_reference.swiglu(x, row_weights)
    made_forward = quantize_swiglu_forward(x, groups, scale_format, token_tile=token_tile, x_rows=True, **options)
    rows, long_tiles = made_forward.rows, made_forward.long_tiles
    assert long_tiles
    assert made_forward.x_rows
    for actual, right in zip(
        made_forward.x_rows.tensors, reference.quantize_rows(x, groups, ScaleFormat.FP32).tensors, strict=True
    ):
        assert_same_bits(actual, right)
    only_rows, _ = quantize_swiglu(x, groups, scale_format, **options)
    assert only_rows
    assert_same_bits(rows.data, only_rows.data)
    assert_same_bits(rows.scale, only_rows.scale)
    assert long_tiles.token_tile == token_tile

    expected = reference.quantize_tokens(act, groups, scale_format, layout, token_tile)
    _, tokens = quantize_swiglu(x, groups, scale_format, rows=False, tokens=layout, long_tiles=long_tiles, **options)
    gradients = quantize_swiglu_backward(
        d_act, x, groups, scale_format, layout=layout, long_tiles=long_tiles, **options
    )
    plain = quantize_swiglu_backward(d_act, x, groups, scale_format, layout=layout, **options)
    for made in (tokens, gradients.act_tokens):
        assert made
        assert made.token_tile == token_tile
        assert_same_bits(made.data, expected.data)
        assert_same_bits(made.scale, expected.scale)
    assert gradients.d_x_tokens
    assert plain.d_x_tokens
    assert gradients.d_x_tokens.token_tile == 128
    assert_same_bits(gradients.d_x_tokens.data, plain.d_x_tokens.data)


def test_padded_input_by_a_map_of_its_own() -> None:
    x = torch.randn(200, 256)
    groups = plan_groups(offsets([70, 130]), 200)
    live = groups.row_source >= 0
    padded = torch.full((groups.capacity, 256), torch.nan)
    padded[live] = x[groups.row_source[live].long()]
    own_rows = torch.where(live, torch.arange(groups.capacity, dtype=torch.int32), -1)
    of_ragged, _ = quantize_swiglu(x, groups, ScaleFormat.FP32)
    of_padded, _ = quantize_swiglu(padded, groups.gathering(own_rows), ScaleFormat.FP32)
    assert of_ragged
    assert of_padded
    assert_same_bits(of_padded.data, of_ragged.data)
    gradients = quantize_swiglu_backward(
        padded[:, :128], padded, groups.gathering(own_rows), ScaleFormat.FP32, d_row_weights=True
    )
    assert gradients.d_row_weights is not None
    assert gradients.d_row_weights[:, live].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_tile(bad: float) -> None:
    x = torch.randn(4, 768)
    clean = swiglu_quantize(x, group_size=96)
    x[2, 384 + 100] = bad  # of up: feature 100, the second group of row 2
    dirty = swiglu_quantize(x, group_size=96)
    assert dirty.scale[2, 1].isnan()
    assert (dirty.data.view(torch.uint8)[2, 96:192] == 0x7F).all()
    others = torch.ones(4, 4, dtype=torch.bool)
    others[2, 1] = False
    assert_same_bits(dirty.scale[others], clean.scale[others])
    assert_same_bits(dirty.data.view(4, 4, 96)[others], clean.data.view(4, 4, 96)[others])


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
@pytest.mark.parametrize("layout", ScaleLayout)
def test_every_row_count_and_scale_layout(num_rows: int, layout: ScaleLayout) -> None:
    x = torch.randn(num_rows, 2 * 160).bfloat16()
    out = swiglu_quantize(x, group_size=32, scale_layout=layout)
    assert out.data.shape == (num_rows, 160)
    assert out.scale.shape == (num_rows, 5)
    stride = {
        ScaleLayout.ROW_MAJOR: (5, 1),
        ScaleLayout.COLUMN_MAJOR: (1, num_rows),
        ScaleLayout.COLUMN_MAJOR_TMA: (1, -(-num_rows // 4) * 4),
    }[layout]
    assert num_rows == 0 or out.scale.stride() == stride
    if num_rows:
        gate, up = x.float().chunk(2, 1)
        decoded = out.data.float().view(num_rows, 5, 32) * out.scale[:, :, None]
        assert sqnr(decoded.flatten(1), F.silu(gate) * up) > 28


@pytest.mark.parametrize("group_size", [32, 96, 320, 960])
@pytest.mark.parametrize("layout", ScaleLayout)
def test_packed_scales_are_the_exponents(group_size: int, layout: ScaleLayout) -> None:
    x = torch.randn(7, 2 * 960) * torch.logspace(-9, 9, 7)[:, None]
    options: dict[str, Any] = {"group_size": group_size, "scale_format": ScaleFormat.POW2, "scale_layout": layout}
    plain, packed = swiglu_quantize(x, **options), swiglu_quantize(x, packed_ue8m0=True, **options)
    assert_same_bits(packed.data, plain.data)
    assert_same_bits(packed.scale, pack_ue8m0(plain.scale))
    assert_same_bits(unpack_ue8m0(packed.scale, 960 // group_size), plain.scale.contiguous())
    assert packed.scale.stride(0 if layout is not ScaleLayout.ROW_MAJOR else 1) == 1


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_groups_of_128_are_the_row_operand(scale_format: ScaleFormat) -> None:
    x, row_weights = torch.randn(256, 512).half(), torch.rand(256).bfloat16()
    groups = plan_groups(offsets([128, 128]), 256)
    rows, _ = quantize_swiglu(x, groups, scale_format, row_weights=row_weights)
    act = swiglu_reference.swiglu(x, row_weights)
    rows_of_rounded = reference.quantize_rows(act.bfloat16(), groups, scale_format)
    assert rows
    for expected, rounded in ((rows, False), (rows_of_rounded, True)):
        out = swiglu_quantize(
            x, scale_format=scale_format, row_weights=row_weights, round_through_bf16=rounded,
            scale_layout=ScaleLayout.COLUMN_MAJOR,
        )  # fmt: skip
        assert_same_bits(out.data, expected.data[:256])
        assert_same_bits(out.scale, expected.scale[:256])
    assert not rows.data.view(torch.uint8).equal(rows_of_rounded.data.view(torch.uint8))


def test_any_strides_and_no_gradient() -> None:
    x = torch.randn(50, 640, requires_grad=True)
    expected = swiglu_quantize(x[::2, 64:576].contiguous())
    for view in (x[::2, 64:576], x[::2, 64:576].t().contiguous().t()):
        out = swiglu_quantize(view)
        assert_same_bits(out.data, expected.data)
        assert_same_bits(out.scale, expected.scale)
        assert not out.scale.requires_grad


def test_compiles_without_a_break() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        out = swiglu_quantize(
            x, scale_format=ScaleFormat.POW2, packed_ue8m0=True, scale_layout=ScaleLayout.COLUMN_MAJOR_TMA
        )
        return out.data, out.scale

    x = torch.randn(30, 768)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), function(x), strict=True):
        assert actual.stride() == expected.stride()
        assert_same_bits(actual, expected)


def test_fake_tensors_of_the_operators_are_as_the_real_ones() -> None:
    x, d_act, row_weights = torch.randn(200, 512), torch.randn(200, 256), torch.rand(200)
    groups = plan_groups(offsets([70, 130]), 200)
    plan, stored = groups.tensors, reference.quantize_rows(x, groups, ScaleFormat.FP32).tensors
    options = (row_weights, "fp32", 256, "swiglu", None, False)
    long_tiles = (256, torch.ones(plan[2].shape[0] // 128, 256))
    for name, arguments in (
        ("quantize_swiglu", (x, None, plan, True, "per expert", 128, None, *options)),
        ("quantize_swiglu", (x, None, plan, False, "per expert", *long_tiles, *options)),
        ("quantize_swiglu", (*stored, plan, False, "per expert", 128, None, *options)),
        ("quantize_swiglu_forward", (x, plan, 256, False, *options)),
        ("quantize_swiglu_forward", (x, plan, 128, True, *options)),
        ("quantize_swiglu_forward", (x, plan, 512, True, *options)),
        (
            "quantize_swiglu_backward",
            (d_act, x, None, plan, True, True, True, True, False, "side by side", 128, None, *options),
        ),
        (
            "quantize_swiglu_backward",
            (d_act, *stored, plan, False, True, True, False, False, "per expert", *long_tiles, *options),
        ),
    ):
        operator = getattr(torch.ops.fp8moe, name).default
        # What tests the schema multiplies the arguments, and there is no product of e4m3.
        takes_codes = any(argument is stored[0] for argument in arguments)
        test_utils = ("test_faketensor",) if takes_codes else ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=test_utils)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x is a list; it must be a torch\.Tensor"),
        ({"x": torch.ones(3, 256, dtype=torch.float64)}, TypeError, r"x has dtype torch\.float64; it must be one of"),
        ({"x": torch.ones(256)}, ValueError, r"x has shape \(256,\); it must be 2D"),
        ({"x": torch.ones(3, 257)}, ValueError, r"x has shape \(3, 257\); it must be 2D, \(rows, 2I\)"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x has shape \(3, 0\)"),
        ({"x": torch.ones(3, 256).to_sparse()}, ValueError, r"x has layout torch\.sparse_coo; it must be dense"),
        ({"x": torch.ones(3, 256, device="meta")}, ValueError, "x is on meta; the device must be one of cpu, cuda"),
        ({"layout": "gate"}, ValueError, "layout is 'gate'; it must be 'gate_up' or 'up_gate'"),
        ({"group_size": 128.0}, TypeError, r"group_size is 128\.0; it must be an int"),
        ({"group_size": 16}, ValueError, "group_size is 16; it must be at least 32"),
        ({"group_size": 96}, ValueError, "group_size is 96; .* divide the 128 features"),
        ({"scale_format": "fp32"}, TypeError, "scale_format is 'fp32'; it must be a ScaleFormat"),
        ({"scale_layout": None}, TypeError, "scale_layout is None; it must be a ScaleLayout"),
        ({"packed_ue8m0": 1}, TypeError, "packed_ue8m0 is 1; it must be a bool"),
        ({"round_through_bf16": None}, TypeError, "round_through_bf16 is None; it must be a bool"),
        ({"packed_ue8m0": True}, ValueError, "packed_ue8m0 needs powers of two .* pass ScaleFormat.POW2"),
        ({"row_weights": torch.ones(4)}, ValueError, r"row_weights has shape \(4,\); it must be \(3,\)"),
        ({"row_weights": torch.ones(3).int()}, TypeError, r"row_weights has dtype torch\.int32"),
        ({"row_weights": torch.ones(3, device="meta")}, ValueError, "row_weights is on meta and x on cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp8moe.swiglu_quantize(**{"x": torch.ones(3, 256), **arguments})


def test_gate_and_up_may_be_either_half() -> None:
    x = torch.randn(9, 256)
    swapped = torch.cat(x.chunk(2, 1)[::-1], 1)
    one, other = swiglu_quantize(x), swiglu_quantize(swapped, layout="up_gate")
    assert_same_bits(one.data, other.data)
    groups = plan_groups(offsets([9]), 9)
    rows, _ = quantize_swiglu(x, groups, ScaleFormat.FP32)
    assert rows
    assert_same_bits(rows.data[:9], one.data)
