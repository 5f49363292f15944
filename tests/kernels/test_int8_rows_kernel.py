"""The quantizers of rows equal their definition bit for bit; SwiGLU up to its exponential, and then bit for bit."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.int8.reference import encode, quantize_tiles, scaling
from fp8moe.int8.rows import gate_of, smoothed, swiglu_values
from fp8moe.kernels.int8 import rows
from fp8moe.kernels.int8.rows import launch_quantize_rows
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, VALUE_KINDS, offsets, values
from tests.kernels.support import device_activation
from tests.measures import assert_same_bits


def poisoned(num_rows: int, num_features: int, tile: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full((num_rows, num_features), -128, dtype=torch.int8, device=device)
    return codes, torch.full((num_rows, -(-num_features // tile)), -1.0, device=device)


@given(
    num_rows=st.sampled_from([0, 1, 127, 128, 129]),
    num_features=st.sampled_from([1, 8, 130, 200, 257]),
    tile=st.sampled_from([1, 96, 128, 1000]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS),
    levels=st.sampled_from([127, 7]),
    away=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(129, 257, 1000, torch.bfloat16, "outliers", 127, False, 0)
@example(129, 257, 96, torch.float32, "nan", 127, False, 0)
@example(128, 200, 96, torch.float16, "subnormal", 7, True, 0)
@example(1, 130, 1000, torch.float32, "huge", 127, True, 0)
def test_equals_definition(
    device: torch.device, num_rows: int, num_features: int, tile: int, dtype: torch.dtype, kind: str, levels: int,
    away: bool, seed: int,
) -> None:  # fmt: skip
    if tile == 1 and num_rows > 1:
        num_rows = 3  # a program for each element: slow here, and no other
    x = values(kind, (num_rows, num_features), dtype, seed).to(device)
    codes, scales = poisoned(num_rows, num_features, tile, device)
    if num_rows:
        launch_quantize_rows(x, codes, scales, tile, levels, away)
    expected_codes, expected_scales = quantize_tiles(x.float(), tile, levels, away)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales.nan_to_num(nan=-5.0), expected_scales.nan_to_num(nan=-5.0))


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("levels", [127, 7])
def test_values_next_to_the_middle_between_codes(device: torch.device, levels: int, away: bool) -> None:
    """Products that only the exact value tells from a half, for many scales."""
    amax = 1 + torch.rand(40)
    _, factor = scaling(amax, levels)
    middles = torch.arange(-levels, levels) + 0.5
    x = (middles / factor[:, None].double()).float()  # rounded to one side of the middle or to the other, or onto it
    x = torch.cat([amax[:, None], x, x.nextafter(torch.tensor(9.0)), x.nextafter(torch.tensor(-9.0))], 1).to(device)
    codes, scales = poisoned(x.shape[0], x.shape[1], x.shape[1], device)
    launch_quantize_rows(x, codes, scales, x.shape[1], levels, away)
    assert_same_bits(codes, encode(x, scaling(amax.to(device), levels)[1][:, None], away))
    ties = torch.tensor([[levels, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997]], device=device)
    codes, scales = poisoned(1, 8, 8, device)
    launch_quantize_rows(ties, codes, scales, 8, levels, away)
    expected = [1, 2, 3, -1, -2, -3, 0] if away else [0, 2, 2, 0, -2, -2, 0]
    assert codes.tolist() == [[levels, *expected]]
    assert scales.item() == 1


def test_rows_longer_than_a_program_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_COLUMNS", 64)
    for kind in ("outliers", "nan"):
        x = values(kind, (5, 1000), torch.bfloat16, 1).to(device)
        codes, scales = poisoned(5, 1000, 1000, device)
        launch_quantize_rows(x, codes, scales, 1000, 127, False)
        expected_codes, expected_scales = quantize_tiles(x.float(), 1000, 127, False)
        assert_same_bits(codes, expected_codes)
        assert torch.equal(scales.nan_to_num(nan=-5.0), expected_scales.nan_to_num(nan=-5.0))
    gate_up = values("normal", (5, 2000), torch.float32, 1).to(device)
    out = torch.full((5, 1000), torch.nan, device=device)
    launch_quantize_rows(gate_up, out, None, 1000, 127, False, up=1000)
    torch.testing.assert_close(out, swiglu_values(gate_up, up_first=False))


@pytest.mark.parametrize("sizes", [[3, 0, 40, 1], [0, 0, 0], [0, 44], [44]])
@pytest.mark.parametrize("gathered", [False, True])
def test_smoothing_takes_the_scales_of_the_expert(device: torch.device, sizes: list[int], gathered: bool) -> None:
    num_rows = 50  # six of them at least belong to no expert
    x = values("normal", (20 if gathered else num_rows, 136), torch.bfloat16, 0)
    x[-1] = torch.nan if not gathered else x[-1]
    x, offs = x.to(device), offsets(sizes, device)
    inv_smooth = (torch.rand(len(sizes), 136) + 0.1).to(device)
    source = torch.randint(20, (num_rows,), dtype=torch.int32).to(device) if gathered else None
    codes, scales = poisoned(num_rows, 136, 64, device)
    launch_quantize_rows(x, codes, scales, 64, 127, False, inv_smooth, offs, source)
    expected_codes, expected_scales = quantize_tiles(smoothed(x, inv_smooth, offs, source), 64, 127, False)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)
    assert (scales[sum(sizes) :] == 1).all()


def test_more_experts_than_are_compared_at_once(device: torch.device) -> None:
    sizes = [1] * 300
    x, inv_smooth = torch.ones(300, 8, device=device), torch.arange(1.0, 301, device=device)[:, None].repeat(1, 8)
    codes, scales = poisoned(300, 8, 8, device)
    launch_quantize_rows(x, codes, scales, 8, 127, False, inv_smooth, offsets(sizes, device))
    assert (codes == 127).all()
    assert torch.equal(scales[:, 0], torch.arange(1.0, 301, device=device) / torch.full((300,), 127.0, device=device))


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_swiglu(device: torch.device, dtype: torch.dtype, up_first: bool) -> None:
    gate_up = values("normal", (7, 512), dtype, 0).to(device)
    in_order = gate_up.roll(256, 1) if up_first else gate_up
    gate, up = gate_of(gate_up, up_first)
    act = device_activation(in_order, None)
    codes, scales = poisoned(7, 256, 96, device)
    launch_quantize_rows(gate, codes, scales, 96, 127, False, up=up)
    expected_codes, expected_scales = quantize_tiles(act, 96, 127, False)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)
    out = torch.full((7, 256), torch.nan, dtype=dtype, device=device)
    launch_quantize_rows(gate, out, None, 256, 127, False, up=up)
    assert_same_bits(out, act.to(dtype))
    torch.testing.assert_close(act, swiglu_values(gate_up, up_first))


@pytest.mark.gpu
@pytest.mark.large
def test_more_elements_than_int32() -> None:
    x = torch.randn(70000, 32768, dtype=torch.bfloat16, device="cuda")
    codes, scales = poisoned(70000, 32768, 32768, x.device)
    launch_quantize_rows(x, codes, scales, 32768, 127, False)
    for part in (slice(0, 100), slice(-100, None)):
        expected_codes, expected_scales = quantize_tiles(x[part].float(), 32768, 127, False)
        assert_same_bits(codes[part], expected_codes)
        assert_same_bits(scales[part], expected_scales)
