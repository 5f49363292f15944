"""The torch reference against independent definitions: exact rational arithmetic and the list of all e4m3 values."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe import quantize
from fp8moe.config import ScaleFormat
from fp8moe.operands import TokenGroups, TokenLayout
from fp8moe.quantize import reference
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, VALUE_KINDS, group_sizes, offsets, values
from tests.measures import assert_same_bits, sqnr

E4M3_VALUES = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448
formats = pytest.mark.parametrize("scale_format", ScaleFormat)


def nearest_e4m3(x: float) -> float:
    """The e4m3 value nearest to |x|, the one with an even code on a tie, by searching all of them."""
    distance = (E4M3_VALUES - min(abs(x), 448.0)).abs()
    candidates = (distance == distance.min()).nonzero().flatten().tolist()
    code = next(code for code in candidates if code % 2 == 0 or len(candidates) == 1)
    return float(torch.tensor(float(E4M3_VALUES[code])).copysign(torch.tensor(x)))


def round_to_fp32(value: Fraction) -> float:
    """Correctly rounded: Python's division of integers rounds to fp64 once; the tie is broken by exact comparison."""
    guess = torch.tensor(float(value), dtype=torch.float64).float()
    neighbours = [guess, torch.nextafter(guess, torch.tensor(0.0)), torch.nextafter(guess, torch.tensor(torch.inf))]
    return min((float(x) for x in neighbours), key=lambda x: abs(Fraction(x) - value))


@formats
@given(kind=st.sampled_from(VALUE_KINDS), seed=st.integers(0, 999))
def test_one_tile_by_exact_arithmetic(scale_format: ScaleFormat, kind: str, seed: int) -> None:
    x = values(kind, (128,), torch.float32, seed)
    data, scale = reference.quantize_tiles(x, (0,), scale_format)
    amax = max(Fraction(float(x.abs().max())), Fraction(2) ** -100)
    if scale_format is ScaleFormat.FP32:
        assert float(scale) == round_to_fp32(amax / 448)
        factor = Fraction(round_to_fp32(448 / amax))
        scaled = [round_to_fp32(Fraction(float(v)) * factor) for v in x]
    else:
        power = Fraction(float(scale))
        assert power.numerator == 1 or power.denominator == 1
        assert power.numerator * power.denominator & (power.numerator * power.denominator - 1) == 0
        assert power >= Fraction(round_to_fp32(amax / 448)) > power / 2
        scaled = [float(Fraction(float(v)) / power) for v in x]
    assert data.float().tolist() == [nearest_e4m3(v) for v in scaled]


def test_every_rounding_tie_goes_to_even() -> None:
    values_ = E4M3_VALUES.float()
    ties = (values_[:-1] + values_[1:]) / 2
    x = torch.cat([ties, torch.tensor([448.0])])  # amax is 448, so the factor is 1
    data, scale = reference.quantize_tiles(x, (0,), ScaleFormat.FP32)
    assert float(scale) == 1.0
    assert (data.view(torch.uint8)[:-1] % 2 == 0).all()


@formats
@pytest.mark.parametrize("kind", NON_FINITE_KINDS)
def test_tile_with_nan_or_infinity_is_nan_as_a_whole(scale_format: ScaleFormat, kind: str) -> None:
    x = torch.randn(3, 128)
    x[1, 70] = {"nan": torch.nan, "negative nan": -torch.nan, "infinity": -torch.inf}[kind]
    data, scale = reference.quantize_tiles(x, (1,), scale_format)
    assert (data.view(torch.uint8)[1] == 0x7F).all()
    assert scale.view(torch.int32)[1] == 0x7FC00000
    clean, clean_scale = reference.quantize_tiles(x[::2], (1,), scale_format)
    assert_same_bits(data[::2], clean)
    assert_same_bits(scale[::2], clean_scale)


@formats
def test_smallest_and_largest_values(scale_format: ScaleFormat) -> None:
    for value in (1e-45, 2.0**-126, 2.0**-101, 2.0**-100, 1.0, torch.finfo(torch.float32).max):
        x = torch.full((1, 128), value)
        data, scale = reference.quantize_tiles(x, (1,), scale_format)
        assert scale.isfinite().all()
        assert scale.item() > 0
        if value >= 2.0**-100:
            assert torch.allclose(data.double() * scale.double(), x.double(), rtol=2**-4)


def decoded(x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Rows and tokens of `x` as the operands hold them, back in the caller's order, `(M, D)` each."""
    rows, tokens = quantize.quantize_rows_and_tokens(x, groups, scale_format, layout)
    at = groups.token_row.long()
    return reference.dequantize_rows(rows)[at], reference.dequantize_tokens(tokens, groups).t()[at]


@formats
@pytest.mark.parametrize("layout", TokenLayout)
@given(sizes=group_sizes(), dtype=st.sampled_from(FLOAT_DTYPES), seed=st.integers(0, 99))
def test_every_row_arrives_and_padding_is_zero(
    scale_format: ScaleFormat, layout: TokenLayout, sizes: list[int], dtype: torch.dtype, seed: int
) -> None:
    x = values("normal", (sum(sizes), 256), dtype, seed)
    groups = plan_groups(offsets(sizes), x.shape[0])
    by_rows, by_tokens = decoded(x, groups, scale_format, layout)
    # Half a unit in the last of 4 significant bits, or of the smallest subnormal at the scale of a tile's amax.
    for actual, amax in (
        (by_rows, x.float().abs().view(-1, 2, 128).amax(2, keepdim=True).expand(-1, 2, 128).reshape(x.shape)),
        (by_tokens, torch.full_like(x, float(x.abs().max()) if x.numel() else 0.0).float()),
    ):
        assert ((actual - x.float()).abs() <= x.float().abs() * 2**-4 + amax / 448 * 2**-8).all()
    rows, tokens = quantize.quantize_rows_and_tokens(x, groups, scale_format, layout)
    padding = groups.row_source < 0
    assert (rows.data.view(torch.uint8)[padding] == 0).all()
    assert (reference.dequantize_tokens(tokens, groups)[:, padding] == 0).all()
    assert rows.scale.isfinite().all()


@formats
@pytest.mark.parametrize("layout", TokenLayout)
def test_one_read_makes_the_same_operands_as_two(scale_format: ScaleFormat, layout: TokenLayout) -> None:
    x = torch.randn(500, 384)
    groups = plan_groups(offsets([200, 0, 130, 1, 169]), 500)
    rows, tokens = quantize.quantize_rows_and_tokens(x, groups, scale_format, layout)
    only_rows = quantize.quantize_rows(x, groups, scale_format)
    only_tokens = quantize.quantize_tokens(x, groups, scale_format, layout)
    for one, other in ((rows, only_rows), (tokens, only_tokens)):
        assert_same_bits(one.data, other.data)
        assert_same_bits(one.scale, other.scale)
    assert rows.scale.stride() == (1, groups.capacity)
    assert tokens.scale.t().is_contiguous()


def tile_of_every_row(sizes: list[int], token_tile: int) -> list[int]:
    """For each padded row a number that it shares with the rows of its token tile, and with no other."""
    tiles: list[int] = []
    for size in sizes:
        rows = -(-size // 128) * 128
        first = len(tiles)
        tiles += [first + row // token_tile * token_tile for row in range(rows)]
    return tiles


@formats
@pytest.mark.parametrize("token_tile", [256, 512])
@given(
    sizes=group_sizes(max_groups=4, max_rows=1400), kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS),
    dtype=st.sampled_from(FLOAT_DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_long_token_tiles_begin_with_their_group(
    scale_format: ScaleFormat, token_tile: int, sizes: list[int], kind: str, dtype: torch.dtype, seed: int
) -> None:
    x = values(kind, (sum(sizes), 128), dtype, seed)
    groups = plan_groups(offsets(sizes), x.shape[0])
    tokens = reference.quantize_tokens(x, groups, scale_format, TokenLayout.SIDE_BY_SIDE, token_tile)
    measured = reference.measure_long_tiles(x, groups, token_tile).amax
    padded = reference.gather_padded_rows(x, groups)
    tile_of = torch.tensor(tile_of_every_row(sizes, token_tile))
    for tile in tile_of.unique().tolist():
        rows = (tile_of == tile).nonzero().flatten()
        data, scale = reference.quantize_tiles(padded[rows], (0,), scale_format)
        amax = padded[rows].abs().amax(0)
        for block in (rows[::128] // 128).tolist():
            torch.testing.assert_close(measured[block], amax, rtol=0, atol=0, equal_nan=True)
        is_nothing = amax < 2.0**-60
        data = torch.where(is_nothing, data.float() * 0, data.float()).to(torch.float8_e4m3fn)
        scale = scale.squeeze(0).masked_fill(is_nothing, 1.0)
        actual = tokens.data[:, rows].t()
        assert torch.equal(actual.isnan(), data.isnan())
        assert torch.equal(actual.float().nan_to_num(), data.float().nan_to_num())
        assert_same_bits(tokens.scale[:, rows[::128] // 128], scale[:, None].expand(-1, len(rows) // 128))


def test_layouts_hold_the_same_values_in_different_places() -> None:
    x = torch.randn(500, 256)
    groups = plan_groups(offsets([200, 0, 130, 1, 169]), 500)
    side = quantize.quantize_tokens(x, groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE)
    flat = quantize.quantize_tokens(x, groups, ScaleFormat.FP32, TokenLayout.PER_EXPERT)
    assert_same_bits(side.scale, flat.scale)
    start = 0
    for size in (256, 0, 256, 128, 256):
        block = flat.data[start * 256 : (start + size) * 256].view(256, size)
        assert_same_bits(block, side.data[:, start : start + size])
        start += size


@formats
def test_weight_orientations_share_data_and_scales(scale_format: ScaleFormat) -> None:
    w = torch.randn(3, 256, 384) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    forward = quantize.quantize_weight_for_forward(w, scale_format)
    dgrad = quantize.quantize_weight_for_dgrad(w, scale_format)
    assert_same_bits(forward.data.transpose(1, 2), dgrad.data)
    assert_same_bits(forward.scale.transpose(1, 2), dgrad.scale)
    assert forward.data.is_contiguous()
    assert dgrad.data.is_contiguous()
    assert sqnr(reference.dequantize_weight(forward), w) > 30
    assert_same_bits(quantize.quantize_weight_for_forward(w, scale_format).data, forward.data)
    assert_same_bits(quantize.quantize_weight_for_dgrad(w, scale_format).data, dgrad.data)
    # One scale for each 128 x 128 block: the largest magnitude of every block decodes to itself.
    blocks = w.view(3, 2, 128, 3, 128).abs().amax((2, 4))
    decoded_max = reference.dequantize_weight(forward).view(3, 2, 128, 3, 128).abs().amax((2, 4))
    assert torch.allclose(blocks, decoded_max, rtol=1e-6 if scale_format is ScaleFormat.FP32 else 2**-4)


@formats
def test_several_weights_are_quantized_as_one(scale_format: ScaleFormat) -> None:
    parts = [torch.randn(3, n, 256) * size for n, size in ((128, 1.0), (256, 50.0), (128, 0.01))]
    stacked = torch.cat(parts, dim=1)
    for quantized in (quantize.quantize_weight_for_forward, quantize.quantize_weight_for_dgrad):
        actual, expected = quantized(parts, scale_format), quantized(stacked, scale_format)
        assert_same_bits(actual.data, expected.data)
        assert_same_bits(actual.scale, expected.scale)
