"""Every kernel row checks what it times."""

import dataclasses

import pytest
import torch

from fp8moe import KernelPreference
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.kernels import Kernel, kernels, measure_kernel
from fp8moe.bench.problem import Products
from fp8moe.bench.variants import bf16_op
from tests.bench.support import small_lab, small_problem


@pytest.fixture(scope="module")
def expected() -> Products:
    return small_problem().products(bf16_op)


@pytest.fixture(scope="module")
def rows(expected: Products) -> dict[str, Kernel]:
    found = kernels(small_problem(), expected, {KernelPreference.EMULATED})
    return {kernel.name: kernel for kernel in found}


def test_every_function_has_a_row(rows: dict[str, Kernel]) -> None:
    assert list(rows) == [
        "TokenGroups.from_offs",
        "ends_within",
        "quantize_rows",
        "quantize_weight_for_forward",
        "quantize_weight_for_dgrad",
        "quantize_weight",
        "quantize_tokens, side by side",
        "quantize_rows_and_tokens, side by side",
        "quantize_rows_and_tokens, side by side, tiles of 256",
        "quantize_rows_and_tokens, side by side, tiles of 512",
        "requantize_rows_to_tokens, side by side",
        "unpad",
        "zero_unused_rows_",
        "BF16 forward",
        "BF16 dgrad",
        "BF16 wgrad",
        "emulated forward",
        "emulated dgrad",
        "emulated wgrad",
    ]
    assert [name for name, kernel in rows.items() if not kernel.is_ours] == ["BF16 forward", "BF16 dgrad", "BF16 wgrad"]


def test_rates_are_work_over_time(rows: dict[str, Kernel], expected: Products) -> None:
    for name, kernel in rows.items():
        found = measure_kernel(kernel, expected, small_lab())
        assert found.name == name
        assert found.sqnr_db > (25 if kernel.is_ours else 45)
        assert found.gb_s == pytest.approx(found.bytes / found.timing.median_ms / 1e6)
        assert found.tflop_s == pytest.approx(found.flops / found.timing.median_ms / 1e9)
        assert found.flops == (
            2 * 200 * 256 * 128 if name.endswith(("forward", "dgrad", "wgrad")) and "quantize" not in name else 0
        )
        assert found.floor_ms is not None
        assert found.floor_ms >= found.bytes / 1e9 * 1e3 * (1 - 1e-9)


@pytest.mark.parametrize(("gemm", "product"), [("forward", "out"), ("dgrad", "da"), ("wgrad", "dw")])
def test_a_kernel_that_writes_zeros_is_not_timed(
    rows: dict[str, Kernel], expected: Products, gemm: str, product: str
) -> None:
    wrong = dataclasses.replace(rows[f"emulated {gemm}"], run=lambda: torch.zeros_like(expected[product]))
    with pytest.raises(WrongResultError, match=rf"{product} is wrong: SQNR 0\.0 dB"):
        measure_kernel(wrong, expected, small_lab())


def test_a_quantization_with_wrong_scales_is_not_timed(rows: dict[str, Kernel], expected: Products) -> None:
    right = rows["quantize_rows_and_tokens, side by side"]

    def wrong_scales() -> object:
        row_operand, tokens = right.run()
        return row_operand, dataclasses.replace(tokens, stored_scale=tokens.stored_scale.roll(1, dims=0))

    with pytest.raises(WrongResultError, match="tokens is wrong"):
        measure_kernel(dataclasses.replace(right, run=wrong_scales), expected, small_lab())


def test_without_backends_the_quantizations_remain(expected: Products) -> None:
    names = [kernel.name for kernel in kernels(small_problem(), expected, set())]
    assert "quantize_tokens, side by side" in names
    assert names[-1] == "BF16 wgrad"
