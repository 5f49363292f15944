"""The SwiGLU kernels equal their definition as nearly as its exponential allows, and each other bit for bit."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.config import TOKEN_TILES, ScaleFormat
from fp8moe.devices import multiprocessors
from fp8moe.gate import Gate, GatedActivation, GateKind
from fp8moe.kernels.block_sums import launch_block_sums
from fp8moe.kernels.gated import GATES
from fp8moe.kernels.swiglu_backward import launch_quantize_swiglu_backward
from fp8moe.kernels.swiglu_forward import launch_quantize_swiglu
from fp8moe.operands import LongTiles, RowOperand, TokenGroups, TokenLayout, TokenOperand, data_and_scale
from fp8moe.quantize import reference, swiglu_reference
from fp8moe.quantize.swiglu_backward import SwiGLUGradients, quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import quantize_swiglu
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, VALUE_KINDS, group_sizes, offsets, values
from tests.kernels.support import GATES as GATES_OF_TESTS
from tests.kernels.support import device_activation, needs_hopper
from tests.kernels.test_quantize_kernels import (
    EDGE_SIZES,
    assert_same_rows,
    assert_same_tokens,
    poisoned_rows,
    poisoned_tokens,
)
from tests.measures import assert_same_bits, sqnr
from tests.swiglu_tolerance import assert_near, cancelled_terms, exponents, plain, tiles_of_rows, tiles_of_tokens

# The interpreter takes half a second for a tile of backward: fewer examples than elsewhere, no search for smaller ones.
HOPPER_GATES = {GateKind.SWIGLU}
few = settings(max_examples=settings().max_examples * 3 // 10, phases=[Phase.generate])
sizes_of_groups = st.lists(st.sampled_from([0, 1, 60, 127, 128, 129]), min_size=1, max_size=3)
formats = st.sampled_from(list(ScaleFormat))
layouts = st.sampled_from(list(TokenLayout))
dtypes = st.sampled_from(FLOAT_DTYPES)
kinds = st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS)
weight_dtypes = st.sampled_from([None, torch.float32, torch.bfloat16])


def drawn_weights(num_rows: int, dtype: torch.dtype | None, device: torch.device) -> Tensor | None:
    return None if dtype is None else torch.rand(num_rows).to(device, dtype)


def forward(
    x: Tensor | RowOperand, groups: TokenGroups, *, rows: bool = True, tokens: TokenLayout | None = None,
    row_weights: Tensor | None = None, pow2: bool = False, tile_amax: Tensor | None = None,
    act: GatedActivation | None = None, x_rows: RowOperand | None = None,
) -> tuple[RowOperand | None, TokenOperand | None]:  # fmt: skip
    """The forward kernel's operands, in memory that was poisoned."""
    values, _ = data_and_scale(x)
    act = act or swiglu_reference.plain_swiglu(values)
    operands = (
        poisoned_rows(groups, act.padded_features, values.device) if rows else None,
        poisoned_tokens(groups, act.num_features, tokens, values.device) if tokens else None,
    )
    launch_quantize_swiglu(
        x, groups, *operands, row_weights=row_weights, pow2=pow2, act=act, tile_amax=tile_amax, x_rows=x_rows
    )
    return operands


def measured(
    x: Tensor, groups: TokenGroups, token_tile: int, *, row_weights: Tensor | None = None, pow2: bool = False,
    act: GatedActivation | None = None, x_rows: RowOperand | None = None,
) -> tuple[RowOperand, LongTiles]:  # fmt: skip
    """The row operand that the forward kernel makes while it measures, and what it measures; zero where nothing was."""
    act = act or swiglu_reference.plain_swiglu(x)
    rows = poisoned_rows(groups, act.padded_features, x.device)
    tiles = LongTiles(token_tile, torch.zeros(groups.capacity // 128, act.num_features, device=x.device))
    launch_quantize_swiglu(
        x, groups, rows, None, row_weights=row_weights, pow2=pow2, act=act, measured=tiles, x_rows=x_rows
    )
    return rows, tiles


def backward(
    d_act: Tensor, x: Tensor | RowOperand, groups: TokenGroups, made: str = "rows tokens act weights", *,
    layout: TokenLayout = TokenLayout.PER_EXPERT, row_weights: Tensor | None = None, pow2: bool = False,
    act_amax: Tensor | None = None, act: GatedActivation | None = None,
    launch: Callable[..., None] = launch_quantize_swiglu_backward,
) -> SwiGLUGradients:  # fmt: skip
    """What a backward kernel makes of `made`, in memory that was poisoned."""
    num_rows, padded_features = d_act.shape
    values_of_x, _ = data_and_scale(x)
    act, device = act or swiglu_reference.plain_swiglu(values_of_x), d_act.device
    rows = poisoned_rows(groups, values_of_x.shape[1], device) if "rows" in made else None
    tokens = poisoned_tokens(groups, act.width, layout, device) if "tokens" in made else None
    act_tokens = poisoned_tokens(groups, act.num_features, layout, device) if "act" in made else None
    sums = torch.zeros(padded_features // 128, num_rows, device=device) if "weights" in made else None
    bias_sums = d_bias = None
    if "bias" in made:
        bias_sums = torch.full((groups.capacity // 128, act.width), torch.nan, device=device)
        d_bias = torch.full((groups.num_groups, act.width), torch.nan, device=device)
    launch(
        d_act, x, groups, rows, tokens, act_tokens, sums, *([] if bias_sums is None else [bias_sums]),
        row_weights=row_weights, pow2=pow2, act=act, act_amax=act_amax,
    )  # fmt: skip
    if bias_sums is not None and d_bias is not None:
        launch_block_sums(bias_sums, groups, d_bias)
    return SwiGLUGradients(rows, tokens, act_tokens, sums, d_bias)


def check(
    sizes: list[int], unused_rows: int, num_features: int, device: torch.device, *,
    dtype: torch.dtype = torch.bfloat16, kind: str = "normal", scale_format: ScaleFormat = ScaleFormat.FP32,
    layout: TokenLayout = TokenLayout.PER_EXPERT, weights: torch.dtype | None = torch.float32, seed: int = 0,
) -> None:  # fmt: skip
    """Forward and backward against their definition, and against each other."""
    num_rows = sum(sizes) + unused_rows
    groups = plan_groups(offsets(sizes, device), num_rows)
    x = values(kind, (num_rows, 2 * num_features), dtype, seed).to(device)
    d_act = values("outliers", (num_rows, num_features), dtype, seed + 1).to(device)
    row_weights = drawn_weights(num_rows, weights, device)
    x[sum(sizes) :] = torch.nan  # rows of no group are never read
    options = {"row_weights": row_weights, "pow2": scale_format is ScaleFormat.POW2}
    rows, tokens = forward(x, groups, tokens=layout, **options)  # type: ignore[arg-type]
    only_rows, _ = forward(x, groups, **options)  # type: ignore[arg-type]
    gradients = backward(d_act, x, groups, layout=layout, **options)  # type: ignore[arg-type]

    act = swiglu_reference.swiglu(x, row_weights)
    d_x, d_row_weights = swiglu_reference.swiglu_backward(d_act, x, row_weights)
    cancelled = cancelled_terms(d_act, x, row_weights)
    assert rows
    assert tokens
    assert only_rows
    assert gradients.d_x_rows
    assert gradients.d_x_tokens
    assert gradients.act_tokens
    assert gradients.d_row_weights is not None
    assert_near(tiles_of_rows(rows, act, plain(act), groups), scale_format)
    assert_same_rows(only_rows, rows, groups)
    assert_near(tiles_of_tokens(tokens, act, plain(act), groups), scale_format)
    assert_near(tiles_of_rows(gradients.d_x_rows, d_x, cancelled, groups), scale_format)
    assert_near(tiles_of_tokens(gradients.d_x_tokens, d_x, cancelled, groups), scale_format)
    assert_same_tokens(gradients.act_tokens, tokens, groups)

    unweighted = swiglu_reference.swiglu(x, None)
    terms = (d_act.double() * unweighted.double())[: sum(sizes)]
    actual = gradients.d_row_weights.sum(0)[: sum(sizes)]
    error = (actual - d_row_weights[: sum(sizes)]).abs()
    finite = terms.isfinite().all(1)
    assert (error <= 1e-5 * terms.abs().sum(1))[finite & d_row_weights[: sum(sizes)].isfinite()].all()
    assert not actual[~finite].isfinite().any()
    assert (gradients.d_row_weights[:, sum(sizes) :] == 0).all()  # nothing is written there


@few
@given(
    sizes=sizes_of_groups, unused_rows=st.sampled_from([0, 1, 140]), dtype=dtypes, kind=kinds, scale_format=formats,
    layout=layouts, weights=weight_dtypes, seed=st.integers(0, 99),
)  # fmt: skip
def test_kernels_are_near_their_definition(
    device: torch.device, sizes: list[int], unused_rows: int, dtype: torch.dtype, kind: str, scale_format: ScaleFormat,
    layout: TokenLayout, weights: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    check(
        sizes, unused_rows, 128, device,
        dtype=dtype, kind=kind, scale_format=scale_format, layout=layout, weights=weights, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [[0], [1], [127], [128], [129], [0, 5, 0]], ids=str)
def test_kernels_at_edges(device: torch.device, sizes: list[int]) -> None:
    check(sizes, 0, 128, device)


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_several_feature_blocks(device: torch.device, scale_format: ScaleFormat) -> None:
    check([40, 0, 30], 3, 384, device, scale_format=scale_format, layout=TokenLayout.SIDE_BY_SIDE)


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_fused_kernels_quantize_one_activation(device: torch.device, scale_format: ScaleFormat) -> None:
    x, row_weights = torch.randn(133, 512).bfloat16().to(device), torch.rand(133, device=device)
    groups, layout = plan_groups(offsets([100, 33], device), 133), TokenLayout.PER_EXPERT
    act = device_activation(x, row_weights)
    rows = reference.quantize_rows(act, groups, scale_format)
    tokens = reference.quantize_tokens(act, groups, scale_format, layout)

    options: dict[str, Any] = {"row_weights": row_weights, "pow2": scale_format is ScaleFormat.POW2}
    fused_rows, fused_tokens = forward(x, groups, tokens=layout, **options)
    only_rows, _ = forward(x, groups, **options)
    again = backward(act, x, groups, "act", layout=layout, **options)
    assert fused_rows
    assert fused_tokens
    assert only_rows
    assert again.act_tokens
    assert_same_rows(fused_rows, rows, groups)
    assert_same_rows(only_rows, rows, groups)
    assert_same_tokens(fused_tokens, tokens, groups)
    assert_same_tokens(again.act_tokens, tokens, groups)


def test_every_gate_has_device_functions() -> None:
    assert set(GATES) == set(GateKind)


@pytest.mark.parametrize("gate", GATES_OF_TESTS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_activation_is_near_its_definition(device: torch.device, dtype: torch.dtype, gate: Gate) -> None:
    x = values("outliers", (37, gate.projections * 384), dtype, 0).to(device)
    row_weights = torch.rand(37, device=device)
    act = device_activation(x, row_weights, gate)
    expected = swiglu_reference.swiglu(x, row_weights, GatedActivation(384, gate))
    in_the_exponent = 1 + x[:, :384].float().abs()  # a rounding there grows by its size
    assert ((act - expected).abs() <= expected.abs() * in_the_exponent * 2**-21 + 2**-100).all()
    assert sqnr(act, expected) > 120


def gated_problem(
    act: GatedActivation, device: torch.device, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, TokenGroups]:
    """`d_act`, `x` and groups: past the live features zeros, in rows of no group NaN. Clamps have much to do."""
    num_rows, halves, padded = sum(sizes) + 3, act.gate.projections, act.padded_features
    x, d_act = torch.zeros(num_rows, halves, padded), torch.zeros(num_rows, padded)
    x[:, :, : act.num_features] = torch.randn(num_rows, halves, act.num_features) * 3
    d_act[:, : act.num_features] = torch.randn(num_rows, act.num_features)
    x[sum(sizes) :] = torch.nan
    groups = plan_groups(offsets(sizes, device), num_rows)
    return d_act.bfloat16().to(device), x.flatten(1).bfloat16().to(device), groups


def check_gate(
    act: GatedActivation, device: torch.device, *,
    layout: TokenLayout = TokenLayout.SIDE_BY_SIDE, sizes: Sequence[int] = (40, 0, 130), weighted: bool = True,
) -> None:  # fmt: skip
    """Kernels with any gate, bias, order of features and padding, against the definition, as near as plain SwiGLU."""
    d_act, x, groups = gated_problem(act, device, sizes)
    row_weights = torch.rand(len(x), device=device) + 0.5 if weighted else None
    made = "rows tokens act weights" + ("" if act.bias is None else " bias")
    rows, tokens = forward(x, groups, tokens=layout, row_weights=row_weights, act=act)
    only_rows, long_tiles = measured(x, groups, 256, row_weights=row_weights, act=act)
    found = backward(d_act, x, groups, made, layout=layout, row_weights=row_weights, act=act)
    assert rows
    assert tokens
    assert found.d_x_rows
    assert found.d_x_tokens
    assert found.act_tokens
    assert found.d_row_weights is not None

    scale_format, live = ScaleFormat.FP32, act.num_features
    expected = swiglu_reference.swiglu(x, row_weights, act, groups)
    d_x, d_row_weights = swiglu_reference.swiglu_backward(d_act, x, row_weights, act, groups)
    biased = torch.cat([part for part in swiglu_reference.gate_and_up(x, act, groups) if part is not None], dim=1)
    exponent = exponents(biased, act.gate).abs()
    rounded = expected.abs() * exponent
    cancelled = cancelled_terms(d_act[:, :live], biased, row_weights, act.gate)
    cancelled += d_x.abs() * exponent.repeat(1, act.gate.projections)
    wide, wide_rounded = (F.pad(values, (0, act.padded_features - live)) for values in (expected, rounded))
    assert_near(tiles_of_rows(rows, wide, wide_rounded, groups), scale_format)
    assert_near(tiles_of_tokens(tokens, expected, rounded, groups), scale_format)
    d_x_rows, cancelled_rows = (swiglu_reference.padded(values, act) for values in (d_x, cancelled))
    assert_near(tiles_of_rows(found.d_x_rows, d_x_rows, cancelled_rows, groups), scale_format)
    of_parameters, cancelled = (swiglu_reference.as_in_parameters(values, act) for values in (d_x, cancelled))
    assert_near(tiles_of_tokens(found.d_x_tokens, of_parameters, cancelled, groups), scale_format)
    assert_same_rows(only_rows, rows, groups)
    assert_same_tokens(found.act_tokens, tokens, groups)
    amax = reference.measure_long_tiles(expected, groups, 256).amax
    used = int(groups.padded_ends[-1])
    torch.testing.assert_close(long_tiles.amax[: used // 128], amax[: used // 128], rtol=1e-5, atol=0.0)

    padding = groups.row_source[:used] < 0
    for operand in (rows, found.d_x_rows):
        codes = operand.data[:used].float()
        assert codes[padding].count_nonzero() == 0
        assert codes.view(used, -1, act.padded_features)[:, :, live:].count_nonzero() == 0
    of_rows = slice(0, sum(sizes))
    assert sqnr(found.d_row_weights.sum(0)[of_rows], d_row_weights[of_rows]) > 110
    if act.bias is not None:
        assert found.d_bias is not None
        assert sqnr(found.d_bias, swiglu_reference.bias_gradient(of_parameters, groups)) > 110
        assert found.d_bias[torch.tensor(sizes) == 0].count_nonzero() == 0


OTHER_ACTIVATIONS = [
    (gate, features, has_bias, interleaved)
    for gate in GATES_OF_TESTS
    for features, has_bias, interleaved in ((128, False, False), (72, True, gate.has_gate))
] + [(Gate.clamped_swiglu(1.5), 200, True, False), (Gate.swiglu(), 200, False, True)]


@pytest.mark.parametrize(("gate", "features", "has_bias", "interleaved"), OTHER_ACTIVATIONS, ids=str)
def test_other_activations(device: torch.device, gate: Gate, features: int, has_bias: bool, interleaved: bool) -> None:
    bias = torch.randn(3, gate.projections * features, device=device) if has_bias else None
    layout = TokenLayout.PER_EXPERT if has_bias else TokenLayout.SIDE_BY_SIDE
    check_gate(GatedActivation(features, gate, bias, interleaved), device, layout=layout)


@pytest.mark.parametrize("sizes", [(1, 0), (127, 0), (129, 0)], ids=str)
def test_padding_has_no_bias(device: torch.device, sizes: tuple[int, ...]) -> None:
    """Without row weights, which are zeros on padding."""
    bias = torch.randn(2, 2 * 136, dtype=torch.bfloat16, device=device)
    act = GatedActivation(136, Gate.clamped_swiglu(7.0, 1.702, 1.0), bias, interleaved=True)
    check_gate(act, device, sizes=sizes, weighted=False)


def check_stored(act: GatedActivation, device: torch.device, sizes: Sequence[int], *, pow2: bool = False) -> None:
    """What forward stores of gate and up is their row operand; from it kernels make what they make of its values."""
    d_act, x, groups = gated_problem(act, device, sizes)
    row_weights, layout = torch.rand(len(x), device=device) + 0.5, TokenLayout.PER_EXPERT
    options: dict[str, Any] = {"row_weights": row_weights, "pow2": pow2, "act": act}
    stored = poisoned_rows(groups, x.shape[1], device)
    rows, _ = forward(x, groups, x_rows=stored, **options)
    only_rows, _ = forward(x, groups, **options)
    assert rows
    assert only_rows
    assert_same_rows(rows, only_rows, groups)
    assert_same_rows(stored, reference.quantize_rows(x, groups, ScaleFormat.FP32), groups)
    again = poisoned_rows(groups, x.shape[1], device)
    rows, tiles = measured(x, groups, 512, x_rows=again, **options)
    _, expected_tiles = measured(x, groups, 512, **options)
    assert_same_rows(again, stored, groups)
    assert_same_rows(rows, only_rows, groups)
    assert_same_bits(tiles.amax, expected_tiles.amax)

    values = swiglu_reference.stored_values(stored, groups)
    both, expected_both = (forward(each, groups, tokens=layout, **options) for each in (stored, values))
    alone, _ = forward(stored, groups, **options)
    for row_operand in (both[0], alone):
        assert row_operand
        assert expected_both[0]
        assert_same_rows(row_operand, expected_both[0], groups)
    assert both[1]
    assert expected_both[1]
    assert_same_tokens(both[1], expected_both[1], groups)
    made = "rows tokens act weights" + ("" if act.bias is None else " bias")
    found, expected = (backward(d_act, each, groups, made, layout=layout, **options) for each in (stored, values))
    assert found.d_x_rows
    assert expected.d_x_rows
    assert_same_rows(found.d_x_rows, expected.d_x_rows, groups)
    for one, other in ((found.d_x_tokens, expected.d_x_tokens), (found.act_tokens, expected.act_tokens)):
        assert one
        assert other
        assert_same_tokens(one, other, groups)
    for sums, right in ((found.d_row_weights, expected.d_row_weights), (found.d_bias, expected.d_bias)):
        if right is not None:
            assert sums is not None
            assert_same_bits(sums, right)


@pytest.mark.parametrize(
    ("gate", "features", "has_bias", "interleaved"),
    [
        (Gate.swiglu(), 256, False, False),
        (Gate.swiglu(), 200, False, True),
        (Gate.clamped_swiglu(7.0, 1.702, 1.0), 136, True, True),
        (Gate.relu_squared(), 128, True, False),
    ],
    ids=str,
)
def test_gate_and_up_stored_quantized(
    device: torch.device, gate: Gate, features: int, has_bias: bool, interleaved: bool
) -> None:
    bias = torch.randn(3, gate.projections * features, device=device) if has_bias else None
    check_stored(GatedActivation(features, gate, bias, interleaved), device, (40, 0, 130), pow2=features == 256)


@pytest.mark.parametrize("sizes", [[0], [1], [127], [128], [129], [0, 5, 0]], ids=str)
def test_gate_and_up_stored_quantized_at_edges(device: torch.device, sizes: list[int]) -> None:
    check_stored(GatedActivation(128, Gate.swiglu()), device, sizes)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("gate", [gate for gate in GATES_OF_TESTS if gate.kind in HOPPER_GATES], ids=str)
@pytest.mark.parametrize(("features", "interleaved"), [(256, False), (256, True), (200, False), (200, True)])
@pytest.mark.parametrize("weighted", [True, False])
def test_other_activations_on_hopper(gate: Gate, features: int, interleaved: bool, weighted: bool) -> None:
    """Gluon against Triton: the same bits, but for sums in another order."""
    from fp8moe.kernels.sm90.swiglu_backward import launch_quantize_swiglu_backward_hopper

    device, act = torch.device("cuda"), GatedActivation(features, gate, None, interleaved)
    launch = partial(launch_quantize_swiglu_backward_hopper, multiprocessors=multiprocessors(device))
    d_act, x, groups = gated_problem(act, device, (70, 0, 1300, 1))
    row_weights = torch.rand(len(x), device=device) if weighted else None
    options: dict[str, Any] = {"row_weights": row_weights, "act": act}
    for layout, long in itertools.product(TokenLayout, (False, True)):
        options["act_amax"] = measured(x, groups, 512, row_weights=row_weights, act=act)[1].amax if long else None
        expected = backward(d_act, x, groups, layout=layout, **options)
        found = backward(d_act, x, groups, layout=layout, launch=launch, **options)
        for one, other in ((found.d_x_tokens, expected.d_x_tokens), (found.act_tokens, expected.act_tokens)):
            assert one
            assert other
            assert_same_tokens(one, other, groups)
        assert found.d_x_rows
        assert expected.d_x_rows
        assert_same_rows(found.d_x_rows, expected.d_x_rows, groups)
        assert found.d_row_weights is not None
        assert expected.d_row_weights is not None
        assert sqnr(found.d_row_weights[:, :1371], expected.d_row_weights[:, :1371]) > 110


def test_each_output_alone_is_the_same(device: torch.device) -> None:
    x, d_act = torch.randn(70, 256, device=device), torch.randn(70, 128, device=device)
    groups = plan_groups(offsets([70], device), 70)
    row_weights, layout = torch.rand(70, device=device), TokenLayout.SIDE_BY_SIDE
    rows, tokens = forward(x, groups, tokens=layout, row_weights=row_weights)
    only_rows, nothing = forward(x, groups, row_weights=row_weights)
    _, only_tokens = forward(x, groups, rows=False, tokens=layout, row_weights=row_weights)
    assert rows
    assert tokens
    assert only_rows
    assert only_tokens
    assert nothing is None
    assert_same_rows(only_rows, rows, groups)
    assert_same_tokens(only_tokens, tokens, groups)

    every = backward(d_act, x, groups, layout=layout, row_weights=row_weights)
    for made, name in (("rows", "d_x_rows"), ("tokens", "d_x_tokens"), ("act", "act_tokens")):
        one, same = (
            getattr(gradients, name)
            for gradients in (backward(d_act, x, groups, made, layout=layout, row_weights=row_weights), every)
        )
        if made == "rows":
            assert_same_rows(one, same, groups)
        else:
            assert_same_tokens(one, same, groups)
    weights = backward(d_act, x, groups, "weights", row_weights=row_weights).d_row_weights
    assert weights is not None
    assert every.d_row_weights is not None
    assert torch.allclose(weights, every.d_row_weights, rtol=1e-4, atol=1e-4)


def test_any_row_stride_and_a_padded_input(device: torch.device) -> None:
    wide, wide_gradient = torch.randn(160, 300, device=device), torch.randn(160, 140, device=device)
    x, d_act = wide[::2, 20:276], wide_gradient[::2, :128]
    groups = plan_groups(offsets([50, 30], device), 80)
    rows, tokens = forward(x, groups, tokens=TokenLayout.SIDE_BY_SIDE)
    gradients = backward(d_act, x, groups)

    at = groups.token_row.long()
    padded = torch.full((groups.capacity, 256), torch.nan, device=device)
    padded_gradient = torch.full((groups.capacity, 128), torch.nan, device=device)
    padded[at], padded_gradient[at] = x, d_act
    numbers = torch.arange(groups.capacity, dtype=torch.int32, device=device)
    of_padded = replace(groups, row_source=torch.where(groups.row_source < 0, -1, numbers))
    padded_rows, padded_tokens = forward(padded, of_padded, tokens=TokenLayout.SIDE_BY_SIDE)
    padded_gradients = backward(padded_gradient, padded, of_padded)
    for actual, expected in ((padded_rows, rows), (padded_gradients.d_x_rows, gradients.d_x_rows)):
        assert actual
        assert expected
        assert_same_rows(actual, expected, groups)
    for one, other in ((padded_tokens, tokens), (padded_gradients.d_x_tokens, gradients.d_x_tokens)):
        assert one
        assert other
        assert_same_tokens(one, other, groups)
    assert padded_gradients.d_row_weights is not None
    assert gradients.d_row_weights is not None
    assert_same_bits(padded_gradients.d_row_weights[:, at], gradients.d_row_weights)
    assert (padded_gradients.d_row_weights[:, groups.row_source < 0] == 0).all()


def amid_nan(x: Tensor) -> Tensor:
    """`x` as part of a larger tensor of NaN: rows before and after it, features on both sides."""
    wide = torch.full((x.shape[0] + 256, x.shape[1] + 32), torch.nan, dtype=x.dtype, device=x.device)
    part = wide[128:-128, 16:-16]
    part.copy_(x)
    return part


def check_hopper(
    sizes: list[int], unused_rows: int, num_features: int, *,
    dtype: torch.dtype = torch.bfloat16, d_act_dtype: torch.dtype | None = None, kind: str = "outliers",
    weights: torch.dtype | None = torch.float32, sums: bool = True, blocks: int | None = None, seed: int = 0,
    token_tile: int = 128, stored: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Hold the Hopper kernel to the Triton kernel: operands bit for bit, sums but for their order; from `x` itself, or
    as it is `stored` quantized.

    The rows of the inputs are permuted, and what is in no group, or around them, is NaN.
    """
    from fp8moe.kernels.sm90.swiglu_backward import launch_quantize_swiglu_backward_hopper

    device, live, num_rows = torch.device("cuda"), sum(sizes), sum(sizes) + unused_rows
    groups = plan_groups(offsets(sizes, device), num_rows)
    x = amid_nan(values(kind, (num_rows, 2 * num_features), dtype, seed).to(device))
    d_act = amid_nan(values("outliers", (num_rows, num_features), d_act_dtype or dtype, seed + 1).to(device))
    of_row = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)
    used = of_row[:live].long()
    is_used = torch.zeros(num_rows, dtype=torch.bool, device=device).index_fill_(0, used, True)
    if num_rows:
        source = torch.where(groups.row_source < 0, -1, of_row[groups.row_source.clamp(min=0).long()])
        groups = replace(groups, row_source=source)
    x[~is_used], d_act[~is_used] = torch.nan, torch.nan
    row_weights = drawn_weights(num_rows, weights, device)
    if row_weights is not None:
        row_weights[~is_used] = torch.nan

    if token_tile > 128:
        of_forward = {name: value for name, value in options.items() if name != "layout"}
        options["act_amax"] = measured(x, groups, token_tile, row_weights=row_weights, **of_forward)[1].amax
    made = "rows tokens act weights" if sums else "rows tokens act"
    launch = partial(
        launch_quantize_swiglu_backward_hopper, multiprocessors=multiprocessors(device) if blocks is None else blocks
    )
    given = reference.quantize_rows(x, groups, ScaleFormat.FP32) if stored else x
    expected = backward(d_act, given, groups, made, row_weights=row_weights, **options)
    actual = backward(d_act, given, groups, made, row_weights=row_weights, launch=launch, **options)
    assert actual.d_x_rows
    assert actual.d_x_tokens
    assert actual.act_tokens
    assert expected.d_x_rows
    assert expected.d_x_tokens
    assert expected.act_tokens
    assert_same_rows(actual.d_x_rows, expected.d_x_rows, groups)
    assert_same_tokens(actual.d_x_tokens, expected.d_x_tokens, groups)
    assert_same_tokens(actual.act_tokens, expected.act_tokens, groups)
    if not sums:
        return
    assert actual.d_row_weights is not None
    assert expected.d_row_weights is not None
    assert (actual.d_row_weights[:, ~is_used] == 0).all()
    if isinstance(given, RowOperand):
        live_rows = groups.row_source >= 0
        x[groups.row_source[live_rows].long()] = reference.dequantize_rows(given)[live_rows].to(dtype)
    unweighted = swiglu_reference.swiglu(x, None)
    magnitude = (d_act.double() * unweighted.double()).abs().sum(1)[used]
    sums_of_used, expected_sums = actual.d_row_weights[:, used].sum(0), expected.d_row_weights[:, used].sum(0)
    error = (sums_of_used - expected_sums).abs()
    assert (error <= 1e-5 * magnitude)[magnitude < 1e38].all()  # larger ones may overflow in one order alone
    assert not sums_of_used[~magnitude.isfinite()].isfinite().any()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("token_tile", TOKEN_TILES)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("sizes", EDGE_SIZES, ids=str)
def test_hopper_kernel_at_edges(sizes: list[int], stored: bool, token_tile: int) -> None:
    check_hopper(sizes, 0, 256, token_tile=token_tile, stored=stored)


# Few, because each is compiled twice.
HOPPER_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"layout": TokenLayout.SIDE_BY_SIDE, "pow2": True, "weights": torch.bfloat16, "sums": False},
    {"layout": TokenLayout.SIDE_BY_SIDE, "weights": None, "dtype": torch.float16},
    {"weights": None, "pow2": True, "sums": False, "d_act_dtype": torch.float16},
    {"token_tile": 512, "layout": TokenLayout.SIDE_BY_SIDE},
    {"token_tile": 256, "pow2": True, "weights": None},
    {"stored": True, "layout": TokenLayout.SIDE_BY_SIDE},
    {"stored": True, "pow2": True, "token_tile": 512},
    {"stored": True, "sums": False, "weights": None, "d_act_dtype": torch.float16},
)


@needs_hopper
@pytest.mark.gpu
@given(
    variant=st.sampled_from(HOPPER_VARIANTS), sizes=group_sizes(), unused_rows=st.sampled_from([0, 1, 140]),
    feature_blocks=st.integers(1, 4), kind=kinds, blocks=st.sampled_from([1, 2, 7, 132]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_hopper_kernel_equals_the_triton_kernel(
    variant: dict[str, Any], sizes: list[int], unused_rows: int, feature_blocks: int, kind: str, blocks: int,
    seed: int,
) -> None:  # fmt: skip
    check_hopper(sizes, unused_rows, 128 * feature_blocks, kind=kind, blocks=blocks, seed=seed, **variant)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind", VALUE_KINDS + NON_FINITE_KINDS)
@pytest.mark.parametrize("variant", HOPPER_VARIANTS, ids=str)
def test_hopper_kernel_with_more_tiles_than_multiprocessors(variant: dict[str, Any], kind: str) -> None:
    check_hopper([1700, 0, 3000, 1], 17, 1280, kind=kind, **variant)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("input_", ["16-byte vectors", "odd stride", "odd address", "fp32", "transposed"])
def test_backward_operator_takes_inputs_of_either_kernel(input_: str) -> None:
    x, d_act = torch.randn(300, 512, device="cuda").bfloat16(), torch.randn(300, 256, device="cuda").bfloat16()
    groups = plan_groups(offsets([100, 0, 170], "cuda"), 300)
    given_x = {
        "16-byte vectors": x,
        "odd stride": torch.cat([x, x[:, :1]], 1)[:, :512],
        "odd address": torch.cat([x[:, :1], x, x[:, :15]], 1)[:, 1:513],
        "fp32": x.float(),
        "transposed": x.t().contiguous().t(),
    }[input_]
    gradients = quantize_swiglu_backward(d_act, given_x, groups, ScaleFormat.FP32, d_row_weights=True)
    expected = backward(d_act, x, groups)
    assert gradients.d_x_rows
    assert gradients.d_x_tokens
    assert gradients.act_tokens
    assert gradients.d_row_weights is not None
    assert expected.d_x_rows
    assert expected.d_x_tokens
    assert expected.act_tokens
    assert expected.d_row_weights is not None
    assert_same_rows(gradients.d_x_rows, expected.d_x_rows, groups)
    assert_same_tokens(gradients.d_x_tokens, expected.d_x_tokens, groups)
    assert_same_tokens(gradients.act_tokens, expected.act_tokens, groups)
    actual_parts, expected_parts = gradients.d_row_weights[:, :270], expected.d_row_weights[:, :270]
    assert torch.allclose(actual_parts, expected_parts, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_operators_run_the_kernels_and_repeat_their_bits() -> None:
    device = torch.device("cuda")
    x, d_act = torch.randn(5000, 2048, device=device).bfloat16(), torch.randn(5000, 1024, device=device).bfloat16()
    groups = plan_groups(offsets([1700, 0, 3000, 1], device), 5000)
    row_weights = torch.rand(5000, device=device)
    rows, tokens = quantize_swiglu(x, groups, ScaleFormat.FP32, tokens=TokenLayout.PER_EXPERT, row_weights=row_weights)
    kernel_rows, kernel_tokens = forward(x, groups, tokens=TokenLayout.PER_EXPERT, row_weights=row_weights)
    assert rows
    assert tokens
    assert kernel_rows
    assert kernel_tokens
    assert_same_rows(rows, kernel_rows, groups)
    assert_same_tokens(tokens, kernel_tokens, groups)
    first, second = (
        quantize_swiglu_backward(d_act, x, groups, ScaleFormat.FP32, d_row_weights=True, row_weights=row_weights)
        for _ in range(2)
    )
    assert first.d_row_weights is not None
    assert second.d_row_weights is not None
    assert first.d_x_rows
    assert second.d_x_rows
    assert_same_bits(first.d_row_weights[:, :4701], second.d_row_weights[:, :4701])
    assert_same_rows(first.d_x_rows, second.d_x_rows, groups)
    d_x, _ = swiglu_reference.swiglu_backward(d_act, x, row_weights)
    cancelled = cancelled_terms(d_act, x, row_weights)
    assert_near(tiles_of_rows(first.d_x_rows, d_x, cancelled, groups), ScaleFormat.FP32)


@pytest.mark.gpu
@pytest.mark.large
def test_more_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    num_rows = 66000 * 128 - 5
    x = torch.randn(num_rows, 256, dtype=torch.bfloat16, device="cuda")
    groups = plan_groups(torch.tensor([num_rows], dtype=torch.int32, device="cuda"), num_rows)
    rows, _ = forward(x, groups)
    assert rows
    tail = plan_groups(torch.tensor([123], dtype=torch.int32, device="cuda"), 123)
    few_rows, _ = forward(x[-123:], tail)
    assert few_rows
    assert_same_bits(rows.data[num_rows - 123 : num_rows], few_rows.data[:123])
