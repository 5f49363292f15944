"""What the quantizers promise, as users call them; the kernels' tests hold the kernels to the same definition."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.int8 import (
    QuantizedWeight,
    Rounding,
    pack_int4,
    quantize_rows_int8,
    quantize_weight,
    smooth_quantize_rows_int8,
    swiglu_quantize_int8,
    unpack_int4,
)
from fp8moe.int8.reference import encode, scaling
from tests.generators import FLOAT_DTYPES, VALUE_KINDS, offsets, values


@given(
    kind=st.sampled_from(VALUE_KINDS), dtype=st.sampled_from(FLOAT_DTYPES),
    block_k=st.sampled_from([None, 1, 96, 128, 300]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_codes_are_at_most_half_a_step_from_the_value(
    device: torch.device, kind: str, dtype: torch.dtype, block_k: int | None, seed: int
) -> None:
    x = values(kind, (9, 200), dtype, seed).to(device)
    codes, scale = quantize_rows_int8(x, block_k)
    tile = block_k or 200
    assert scale.shape == (9, -(-200 // tile))
    assert codes.abs().max() <= 127
    each = scale.repeat_interleave(tile, 1)[:, :200].double()
    assert ((codes.double() * each - x.double()).abs() <= each * (0.5 + 1e-4)).all()
    for part, tile_scale in zip(x.float().split(tile, 1), scale.t(), strict=True):
        amax = part.abs().amax(1)
        assert torch.equal(tile_scale[amax == 0], torch.ones_like(tile_scale[amax == 0]))
        normal = amax > 1e-30
        assert torch.equal(tile_scale[normal], (amax / torch.full_like(amax, 127))[normal])


def test_rounding_is_that_of_the_exact_product() -> None:
    """Held to rational arithmetic: half to even, or away from zero."""
    torch.manual_seed(0)
    amax = torch.rand(200) + 0.5
    _, factor = scaling(amax, 127)
    x = ((torch.randint(-126, 126, (200,)) + 0.5) / factor.double()).float()
    exact = [Fraction(float(value)) * Fraction(float(by)) for value, by in zip(x, factor, strict=True)]
    assert encode(x, factor, away=False).tolist() == [round(value) for value in exact]
    away = [int(abs(value) + Fraction(1, 2)) * (1 if value > 0 else -1) for value in exact]
    assert encode(x, factor, away=True).tolist() == away


def test_ties_go_to_even_or_away_from_zero(device: torch.device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]], device=device)
    assert quantize_rows_int8(x)[0].tolist() == [[127, 0, 2, 0, -2]]
    away, _ = quantize_rows_int8(x, rounding=Rounding.HALF_AWAY_FROM_ZERO)
    assert away.tolist() == [[127, 1, 2, -1, -3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_never_hidden(device: torch.device, bad: float) -> None:
    x = torch.ones(3, 256, device=device)
    x[1, 200] = bad
    codes, scale = quantize_rows_int8(x, 128)
    assert scale.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert (codes[1, 128:] == 0).all()
    assert (codes[0] == 127).all()
    gate_up = torch.cat([x, torch.ones_like(x)], 1)
    _, scale = swiglu_quantize_int8(gate_up, block_k=128)
    assert scale[1].isnan().tolist() == [False, True] or bad == -float("inf")  # silu(-inf) is NaN too: 0 * inf
    assert not scale[0].isnan().any()


def test_smoothing_multiplies_by_the_inverse_of_the_expert(device: torch.device) -> None:
    x = values("normal", (10, 64), torch.bfloat16, 0).to(device)
    inv_smooth = torch.rand(2, 64, device=device) + 0.5
    codes, scale = smooth_quantize_rows_int8(x, inv_smooth, offsets([4, 3], device), block_k=32)
    expected = [quantize_rows_int8(part.float() * by, 32) for part, by in zip((x[:4], x[4:7]), inv_smooth, strict=True)]
    assert torch.equal(codes[:7], torch.cat([made for made, _ in expected]))
    assert torch.equal(scale[:7], torch.cat([made for _, made in expected]))
    assert (codes[7:] == 0).all()
    token = torch.tensor([3, 3, 0], dtype=torch.int32, device=device)
    gathered = smooth_quantize_rows_int8(x, inv_smooth, offsets([1, 2], device), row_source=token)
    spread = smooth_quantize_rows_int8(x[token.long()], inv_smooth, offsets([1, 2], device))
    assert all(torch.equal(one, other) for one, other in zip(gathered, spread, strict=True))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_swiglu_in_both_layouts(device: torch.device, dtype: torch.dtype) -> None:
    gate, up = (values("normal", (6, 96), dtype, seed).to(device) for seed in (0, 1))
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    made = {}
    for layout, parts in (("gate_up", [gate, up]), ("up_gate", [up, gate])):
        out = swiglu_quantize_int8(torch.cat(parts, 1), layout, quantized=False)
        assert isinstance(out, torch.Tensor)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-6)
        codes, scale = swiglu_quantize_int8(torch.cat(parts, 1), layout, block_k=32)
        each = scale.repeat_interleave(32, 1).double()
        assert ((codes.double() * each - expected).abs() <= each * 0.501).all()
        made[layout] = codes
    assert torch.equal(*made.values())


@given(
    shape=st.sampled_from([(2,), (3, 4), (2, 6, 4), (1, 2, 2)]), dim=st.integers(-3, 2), seed=st.integers(0, 100)
)  # fmt: skip
def test_packing_and_back(device: torch.device, shape: tuple[int, ...], dim: int, seed: int) -> None:
    if not -len(shape) <= dim < len(shape) or shape[dim] % 2:
        return
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8).to(device)
    packed = pack_int4(codes, dim)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 2 == codes.numel()
    assert torch.equal(unpack_int4(packed, dim), codes)


def test_which_nibble_holds_what(device: torch.device) -> None:
    codes = torch.tensor([[-8, 7], [3, -1]], dtype=torch.int8, device=device)
    # Along N: two rows a byte, the first in the low nibble, two's complement.
    assert pack_int4(codes, dim=0).tolist() == [[0x3 << 4 | 0x8, 0xF << 4 | 0x7]]
    # Along K: even k low, odd k high, each plus 8.
    assert pack_int4(codes, dim=1).tolist() == [[15 << 4 | 0], [7 << 4 | 11]]


@pytest.mark.parametrize("group_size", [96, 128, 200, 500, None])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_have_a_scale_for_each_group(device: torch.device, bits: int, group_size: int | None) -> None:
    w = values("normal", (3, 10, 200), torch.bfloat16, 0).to(device)
    w[1, 4] = 0
    quantized = quantize_weight(w, bits, group_size)
    size, levels = group_size or 200, 127 if bits == 8 else 7
    assert quantized.bits == bits
    assert quantized.scale.shape == (3, 10, -(-200 // size))
    assert quantized.data.shape == ((3, 10, 200) if bits == 8 else (3, 5, 200))
    for number, part in enumerate(w.float().split(size, 2)):
        amax = part.abs().amax(2)
        expected = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, levels))
        assert torch.equal(quantized.scale[:, :, number], expected)
    step = quantized.scale.repeat_interleave(size, 2)[:, :, :200]
    assert ((quantized.dequantized() - w.float()).abs() <= 0.5001 * step).all()
    assert quantized.codes.abs().max() == levels
    stored_otherwise = quantize_weight(w.transpose(1, 2).contiguous().transpose(1, 2), bits, group_size)
    assert torch.equal(stored_otherwise.data, quantized.data)


def test_smoothed_weights(device: torch.device) -> None:
    w, smooth = values("normal", (2, 6, 64), torch.float32, 0).to(device), torch.rand(2, 64, device=device) + 0.5
    assert torch.equal(quantize_weight(w, 8, smooth=smooth).data, quantize_weight(w * smooth[:, None], 8).data)


def test_an_unpacked_weight_is_what_the_data_are_now(device: torch.device) -> None:
    quantized = quantize_weight(values("normal", (2, 6, 64), torch.float32, 0).to(device), 4, 32)
    before = quantized.codes
    other = quantize_weight(values("normal", (2, 6, 64), torch.float32, 1).to(device), 4, 32)
    quantized.data.copy_(other.data)
    assert torch.equal(quantized.codes, other.codes)
    assert not torch.equal(quantized.codes, before)


X = torch.zeros(4, 8)
CODES = torch.zeros(4, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_rows_int8(CODES), TypeError, "x has dtype torch.int8"),
        (lambda: quantize_rows_int8(X[0]), ValueError, r"x has shape \(8,\)"),
        (lambda: quantize_rows_int8(X[:, :0]), ValueError, "must have features"),
        (lambda: quantize_rows_int8(X, 0), ValueError, "block_k is 0"),
        (lambda: quantize_rows_int8(X, rounding="even"), TypeError, "rounding is 'even'"),  # type: ignore[arg-type]
        (lambda: quantize_rows_int8(X.clone().requires_grad_()), ValueError, "x requires a gradient"),
        (lambda: smooth_quantize_rows_int8(X, X[:2, :4], offsets([1, 2])), ValueError, "inv_smooth has shape"),
        (lambda: smooth_quantize_rows_int8(X, X[:2], offsets([1])), ValueError, "offsets has shape"),
        (lambda: smooth_quantize_rows_int8(X, X[:2], offsets([1, 2]).long()), TypeError, "offsets has dtype"),
        (lambda: swiglu_quantize_int8(X, "up"), ValueError, "layout is 'up'"),
        (lambda: swiglu_quantize_int8(X[:, :7]), ValueError, "two halves"),
        (lambda: quantize_weight(X, 8), ValueError, "w has shape"),
        (lambda: quantize_weight(X[None], 5), ValueError, "weight_bits is 5"),
        (lambda: quantize_weight(X[None, :3], 4), ValueError, "N must be even"),
        (lambda: quantize_weight(X[None], 8, -1), ValueError, "group_size is -1"),
        (lambda: quantize_weight(X[None], 8, smooth=X), ValueError, "smooth has shape"),
        (lambda: pack_int4(X, 0), TypeError, "codes has dtype"),
        (lambda: pack_int4(CODES[:3], 0), ValueError, "must be even"),
        (lambda: pack_int4(CODES, 2), ValueError, "dim is 2"),
        (lambda: unpack_int4(CODES, 0), TypeError, "packed has dtype"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_weight_says_its_bits() -> None:
    assert QuantizedWeight(CODES[None], torch.ones(1, 4, 1), 8).bits == 8
    assert QuantizedWeight(CODES[None].view(torch.uint8), torch.ones(1, 8, 1), 8).bits == 4
