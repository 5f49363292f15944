"""The products, as users call them, against dequantized operands; and what they refuse."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.int8 import (
    int8_grouped_mm,
    int8_scaled_mm,
    plan_tiles,
    quantize_rows_int8,
    quantize_weight,
)
from tests.generators import FLOAT_DTYPES, group_sizes, offsets


def dequantized_product(x: Tensor, w: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """In fp64, and the sum of magnitudes, by which fp32 errors scale."""
    out, magnitude = torch.zeros(2, x.shape[0], w.shape[1], dtype=torch.float64, device=x.device)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out[start:end] = x[start:end] @ w[expert].t()
        magnitude[start:end] = x[start:end].abs() @ w[expert].abs().t()
    return out, magnitude


@given(
    sizes=group_sizes(max_groups=4, max_rows=40), bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([96, 128, 192, 256, 320, 512]), a_tile=st.sampled_from([None, "equal", "half"]),
    num_features=st.sampled_from([64, 200, 530]), seed=st.integers(0, 100),
)  # fmt: skip
def test_equals_the_product_of_the_dequantized_operands(
    device: torch.device, sizes: list[int], bits: int, group_size: int, a_tile: str | None, num_features: int, seed: int
) -> None:
    torch.manual_seed(seed)
    length = {None: None, "equal": group_size, "half": group_size // 2}[a_tile]
    x, w = torch.randn(sum(sizes) + 2, num_features), torch.randn(len(sizes), 12, num_features)
    codes, scale = quantize_rows_int8(x.to(device), length)
    weight = quantize_weight(w.to(device), bits, group_size)
    offs = offsets(sizes, device)
    out = int8_grouped_mm(
        codes, scale, weight.data, weight.scale, offs, group_size, a_tile=length, out_dtype=torch.float32
    )
    rows = codes.double() * scale.repeat_interleave(length or num_features, 1)[:, :num_features].double()
    expected, magnitude = dequantized_product(rows, weight.dequantized().double(), offs.tolist())
    assert ((out - expected).abs() <= 1e-6 * magnitude).all()
    assert (out[sum(sizes) :] == 0).all()
    assert not sum(sizes) or out.abs().max() > 1


@pytest.mark.parametrize("layout", ["gate_up", "up_gate"])
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_swiglu_rows_and_weights(device: torch.device, layout: str, out_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(9, 64), torch.randn(2, 24, 64) / 8
    codes, scale = quantize_rows_int8(x.to(device))
    weight, offs = quantize_weight(w.to(device), 8, 32), offsets([8, 12], device)
    source = torch.randint(9, (20,), dtype=torch.int32, device=device)
    row_weights = torch.rand(20, device=device)
    out = int8_grouped_mm(
        codes, scale, weight.data, weight.scale, offs, 32, "swiglu", layout=layout, row_source=source,
        row_weights=row_weights, out_dtype=out_dtype, tiles=plan_tiles(offs, 20),
    )  # fmt: skip
    both, _ = dequantized_product(
        (codes.double() * scale.double())[source.long()], weight.dequantized().double(), [8, 20]
    )
    gate, up = both.chunk(2, 1) if layout == "gate_up" else both.chunk(2, 1)[::-1]
    expected = torch.nn.functional.silu(gate) * up * row_weights[:, None].double()
    torch.testing.assert_close(out.double(), expected, rtol=max(1e-4, torch.finfo(out_dtype).eps), atol=1e-5)
    assert out.dtype == out_dtype


def test_no_rows_no_result(device: torch.device) -> None:
    weight = quantize_weight(torch.ones(2, 4, 8, device=device), 8)
    codes, scale = quantize_rows_int8(torch.ones(0, 8, device=device))
    out = int8_grouped_mm(codes, scale, weight.data, weight.scale, offsets([0, 0], device), 8)
    assert out.shape == (0, 4)
    assert out.dtype == torch.bfloat16


def test_the_plan_reads_nothing_until_it_is_asked(device: torch.device) -> None:
    tiles = plan_tiles(offsets([3, 0, 50], device), 60)
    assert tiles.block_rows == 32  # 20 rows an expert on average
    assert tiles.largest_on_host == 50
    tiles.largest.zero_()
    assert tiles.largest_on_host == 50  # read once
    assert plan_tiles(offsets([1] * 4, device), 4).block_rows == 8
    assert plan_tiles(offsets([1] * 4, device), 4, tiled=True).block_rows == 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("by_rows", [False, True])
def test_dense(device: torch.device, by_rows: bool, out_dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    a, a_scale = quantize_rows_int8(torch.randn(33, 100, device=device))
    w, b_scale = quantize_rows_int8(torch.randn(40, 100, device=device))
    b = w.t().contiguous() if by_rows else w.t()
    added = torch.randn(40, device=device) * 10 if bias else None
    out = int8_scaled_mm(a, b, a_scale, b_scale.t(), added, out_dtype)
    expected = (a.double() @ b.double()) * a_scale.double() * b_scale.double().t()
    expected = expected if added is None else expected + added.double()
    torch.testing.assert_close(out.double(), expected, rtol=max(1e-6, torch.finfo(out_dtype).eps), atol=2e-6)
    flat = int8_scaled_mm(a, b, a_scale.flatten(), b_scale.flatten(), added, out_dtype)
    assert torch.equal(flat, out)
    assert int8_scaled_mm(a[:0], b, a_scale[:0], b_scale.t()).shape == (0, 40)


A, A_SCALE = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1)
W, W_SCALE = torch.zeros(2, 6, 64, dtype=torch.int8), torch.ones(2, 6, 2)
OFFS = offsets([1, 3])


def grouped(**changed: object) -> Callable[[], object]:
    given = {
        "a_q": A, "a_scale": A_SCALE, "w_q": W, "w_scale": W_SCALE, "offsets": OFFS, "group_size": 32
    } | changed  # fmt: skip
    return lambda: int8_grouped_mm(**given)  # type: ignore[arg-type]


def dense(**changed: object) -> Callable[[], object]:
    given = {"a": A, "b": W[0].t(), "a_scale": A_SCALE, "b_scale": torch.ones(6)} | changed
    return lambda: int8_scaled_mm(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (grouped(a_q=A.float()), TypeError, "a_q is torch.float32"),
        (grouped(w_q=W.float()), TypeError, "w_q is torch.float32"),
        (grouped(w_q=W[:, :, :32].contiguous()), ValueError, "the same K"),
        (grouped(w_q=W.transpose(1, 2).contiguous().transpose(1, 2)), ValueError, "w_q is not contiguous"),
        (grouped(w_scale=W_SCALE[:, :, :1]), ValueError, r"with group_size=32 it must be \(2, 6, 2\)"),
        (grouped(w_scale=W_SCALE.double()), TypeError, "w_scale has dtype"),
        (grouped(a_scale=A_SCALE[:, 0]), ValueError, "a_scale has shape"),
        (grouped(a_tile=24, a_scale=torch.ones(4, 3)), ValueError, "one must be a multiple of the other"),
        (grouped(a_tile=32), ValueError, "with a_tile=32"),
        (grouped(group_size=0), ValueError, "group_size is 0"),
        (grouped(offsets=OFFS[:1]), ValueError, "offsets has shape"),
        (grouped(epilogue="gelu"), ValueError, "epilogue is 'gelu'"),
        (grouped(epilogue="swiglu", w_q=W[:, :5].contiguous(), w_scale=W_SCALE[:, :5]), ValueError, "two halves"),
        (grouped(layout="x"), ValueError, "layout is 'x'"),
        (grouped(out_dtype=torch.int32), TypeError, "out_dtype is torch.int32"),
        (grouped(block_k=48), ValueError, "block_k is 48"),
        (grouped(row_weights=torch.ones(5)), ValueError, "row_weights has shape"),
        (grouped(row_weights=torch.ones(4, dtype=torch.int32)), TypeError, "row_weights has dtype torch.int32"),
        (grouped(row_source=torch.ones(5)), TypeError, "row_source has dtype"),
        (grouped(tiles=plan_tiles(OFFS, 5)), ValueError, "tiles plans 5 rows"),
        (lambda: plan_tiles(OFFS, 5, 48), ValueError, "block_rows is 48"),
        (dense(a=A.float()), TypeError, "a has dtype"),
        (dense(b=W), ValueError, "b has shape"),
        (dense(b=W[0]), ValueError, r"they must be \(M, K\) and \(K, N\)"),
        (dense(a_scale=torch.ones(1, 4)), ValueError, "a_scale has shape"),
        (dense(b_scale=torch.ones(5)), ValueError, "b_scale has shape"),
        (dense(b_scale=torch.ones(6).double()), TypeError, "b_scale has dtype"),
        (dense(bias=torch.ones(5)), ValueError, "bias has shape"),
        (dense(out_dtype=torch.int8), TypeError, "out_dtype is torch.int8"),
        (dense(a=A[:, :0], b=W[0].t()[:0]), ValueError, "K must be from 1"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
