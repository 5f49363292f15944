"""Long token tiles of SwiGLU's activation: what forward measures, and what is quantized by it, equal the definition bit
for bit, given the activation that the kernels make."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.config import TOKEN_TILES, ScaleFormat
from fp8moe.operands import LongTiles, TokenGroups, TokenLayout
from fp8moe.quantize import reference
from fp8moe.quantize.swiglu_backward import quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import quantize_swiglu, quantize_swiglu_forward
from fp8moe.rows.groups import plan_groups
from tests.generators import NON_FINITE_KINDS, VALUE_KINDS, offsets, values
from tests.kernels.support import device_activation
from tests.kernels.test_quantize_kernels import assert_same_rows, assert_same_tokens
from tests.kernels.test_swiglu_kernels import backward, drawn_weights, forward, measured

LONG_TILES = TOKEN_TILES[1:]
EDGES = [0, 1, 127, 128, 129, 300]

few = settings(max_examples=settings().max_examples * 3 // 10, phases=[Phase.generate])


def assert_same_amax(actual: LongTiles, expected: LongTiles, groups: TokenGroups) -> None:
    used = int(groups.padded_ends[-1]) // 128
    torch.testing.assert_close(actual.amax[:used], expected.amax[:used], rtol=0, atol=0, equal_nan=True)
    assert (actual.amax[used:] == 0).all()  # as it was


def check(
    x: Tensor, sizes: list[int], token_tile: int, *, scale_format: ScaleFormat = ScaleFormat.FP32,
    layout: TokenLayout = TokenLayout.PER_EXPERT, weights: torch.dtype | None = torch.float32,
) -> None:  # fmt: skip
    """All kernels against the definition."""
    row_weights = drawn_weights(x.shape[0], weights, x.device)
    act = device_activation(x, row_weights)
    groups = plan_groups(offsets(sizes, x.device), x.shape[0])
    x[sum(sizes) :] = torch.nan  # rows of no group are never read
    options: dict[str, Any] = {"row_weights": row_weights, "pow2": scale_format is ScaleFormat.POW2}
    rows, long_tiles = measured(x, groups, token_tile, **options)
    assert_same_rows(rows, reference.quantize_rows(act, groups, scale_format), groups)
    assert_same_amax(long_tiles, reference.measure_long_tiles(act, groups, token_tile), groups)

    expected = reference.quantize_tokens(act, groups, scale_format, layout, token_tile)
    both = forward(x, groups, tokens=layout, tile_amax=long_tiles.amax, **options)
    alone = forward(x, groups, rows=False, tokens=layout, tile_amax=long_tiles.amax, **options)
    again = backward(act, x, groups, "act", layout=layout, act_amax=long_tiles.amax, **options)
    assert both[0]
    assert_same_rows(both[0], rows, groups)
    for tokens in (both[1], alone[1], again.act_tokens):
        assert tokens
        assert_same_tokens(tokens, expected, groups)


@pytest.mark.parametrize(
    ("token_tile", "scale_format", "layout"), list(zip(LONG_TILES, ScaleFormat, TokenLayout, strict=True))
)
def test_groups_of_every_kind(
    device: torch.device, token_tile: int, scale_format: ScaleFormat, layout: TokenLayout
) -> None:
    x = values("outliers", (sum(EDGES) + 5, 256), torch.bfloat16, 0).to(device)
    check(x, EDGES, token_tile, scale_format=scale_format, layout=layout)


@pytest.mark.parametrize(("token_tile", "num_features"), [(256, 128), (512, 256)])
def test_an_expert_of_several_tiles(device: torch.device, token_tile: int, num_features: int) -> None:
    x = torch.randn(670, 2 * num_features).half().to(device)
    check(x, [60, 600], token_tile, weights=None)


@few
@given(
    sizes=st.lists(st.sampled_from(EDGES), min_size=1, max_size=3), token_tile=st.sampled_from(LONG_TILES),
    kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS), scale_format=st.sampled_from(list(ScaleFormat)),
    layout=st.sampled_from(list(TokenLayout)), weights=st.sampled_from([None, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_kind_of_values(
    device: torch.device, sizes: list[int], token_tile: int, kind: str, scale_format: ScaleFormat, layout: TokenLayout,
    weights: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    x = values(kind, (sum(sizes) + 1, 256), torch.bfloat16, seed).to(device)
    check(x, sizes, token_tile, scale_format=scale_format, layout=layout, weights=weights)


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_zeros_the_negligible_and_what_is_not_finite(device: torch.device, scale_format: ScaleFormat) -> None:
    x = torch.randn(420, 256)
    x[:140] = 0.0
    x[140:280] *= 2.0**-32  # products of two, both signs
    x[280 + 10, 3], x[280 + 130, 128 + 7] = torch.nan, -torch.inf
    check(x.to(device), [140, 140, 140], 256, scale_format=scale_format)


def test_a_long_tile_of_one_block_is_a_tile_of_128(device: torch.device) -> None:
    """In groups of one tile and 128 rows a long tile is a tile like any other."""
    x, d_act = torch.randn(228, 256, device=device), torch.randn(228, 128, device=device)
    groups = plan_groups(offsets([128, 0, 100], device), 228)
    row_weights, layout = torch.rand(228, device=device), TokenLayout.SIDE_BY_SIDE
    rows, long_tiles = measured(x, groups, 512, row_weights=row_weights)
    only_rows, _ = forward(x, groups, row_weights=row_weights)
    _, tokens = forward(x, groups, tokens=layout, row_weights=row_weights)
    assert only_rows
    assert tokens
    assert_same_rows(rows, only_rows, groups)
    _, long_tokens = forward(x, groups, rows=False, tokens=layout, row_weights=row_weights, tile_amax=long_tiles.amax)
    every = backward(d_act, x, groups, layout=layout, row_weights=row_weights)
    long = backward(d_act, x, groups, layout=layout, row_weights=row_weights, act_amax=long_tiles.amax)
    assert every.d_x_rows
    assert every.d_x_tokens
    assert long.d_x_rows
    assert long.d_x_tokens
    for made in (long_tokens, long.act_tokens):
        assert made
        assert_same_tokens(made, tokens, groups)
    assert_same_rows(long.d_x_rows, every.d_x_rows, groups)
    assert_same_tokens(long.d_x_tokens, every.d_x_tokens, groups)


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_what_exceeds_the_maximum_saturates(device: torch.device, scale_format: ScaleFormat) -> None:
    x, layout = torch.randn(200, 256).bfloat16().to(device), TokenLayout.PER_EXPERT
    groups = plan_groups(offsets([200], device), 200)
    act = device_activation(x, None)
    right = reference.measure_long_tiles(act, groups, 256)
    low = LongTiles(256, right.amax * 0.7)
    expected = reference.quantize_tokens_in(low, act, groups, scale_format, layout)
    options: dict[str, Any] = {"layout": layout, "pow2": scale_format is ScaleFormat.POW2}
    actual = backward(act, x, groups, "act", act_amax=low.amax, **options).act_tokens
    assert actual
    assert_same_tokens(actual, expected, groups)
    assert (actual.data.float().abs() == 448).sum() > (256 if scale_format is ScaleFormat.FP32 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("token_tile", LONG_TILES)
def test_operators_run_the_kernels(token_tile: int) -> None:
    device = torch.device("cuda")
    x, d_act = torch.randn(5000, 2048, device=device).bfloat16(), torch.randn(5000, 1024, device=device).bfloat16()
    groups = plan_groups(offsets([1700, 0, 3000, 1], device), 5000)
    row_weights, layout = torch.rand(5000, device=device), TokenLayout.SIDE_BY_SIDE
    act = device_activation(x, row_weights)
    expected = reference.quantize_tokens(act, groups, ScaleFormat.FP32, layout, token_tile)
    options: dict[str, Any] = {"row_weights": row_weights}
    made_forward = quantize_swiglu_forward(x, groups, ScaleFormat.FP32, token_tile=token_tile, **options)
    long_tiles = made_forward.long_tiles
    assert_same_rows(made_forward.rows, reference.quantize_rows(act, groups, ScaleFormat.FP32), groups)
    _, tokens = quantize_swiglu(
        x, groups, ScaleFormat.FP32, rows=False, tokens=layout, long_tiles=long_tiles, **options
    )
    for made in (
        tokens,
        quantize_swiglu_backward(
            d_act, x, groups, ScaleFormat.FP32, layout=layout, long_tiles=long_tiles, **options
        ).act_tokens,
        quantize_swiglu_backward(
            d_act, x, groups, ScaleFormat.FP32, d_x_rows=False, layout=layout, long_tiles=long_tiles, **options
        ).act_tokens,
    ):
        assert made
        assert made.token_tile == token_tile
        assert_same_tokens(made, expected, groups)
