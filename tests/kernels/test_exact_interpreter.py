"""The mended interpreter converts as PyTorch (and so the hardware) does: every 16-bit pattern, many 32-bit ones."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.conftest import HAS_GPU
from tests.exact_interpreter import convert_float, fused_multiply_add

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the kernels run on the GPU here")


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8e4nv"])
def test_every_pattern_to_fp32_and_back(name: str) -> None:
    import triton.language as tl

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}[name]
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    bits = bits.to(torch.uint8) if dtype.itemsize == 1 else bits.to(torch.int16)
    source = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp8e4nv": tl.float8e4nv}[name]
    patterns = bits.numpy().view(f"uint{8 * dtype.itemsize}")
    wide = convert_float(patterns, source, tl.float32, None).view(np.float32)
    expected = bits.view(dtype).float()
    assert np.array_equal(wide, expected.numpy(), equal_nan=True)
    back = torch.from_numpy(convert_float(wide, tl.float32, source, None).view(f"int{8 * dtype.itemsize}"))
    number = ~expected.isnan()
    assert (back[number] == bits.view(back.dtype)[number]).all()


def test_fp32_to_e4m3_rounds_to_even_saturates_and_has_one_nan() -> None:
    import triton.language as tl

    x = torch.tensor([1.0625, 1.1875, 448.0, 465.0, 1e9, -1e9, torch.inf, torch.nan, -torch.nan, 2**-10, 2**-9, -0.0])
    codes = convert_float(x.numpy(), tl.float32, tl.float8e4nv, None)
    assert codes.tolist() == [0x38, 0x3A, 0x7E, 0x7E, 0x7E, 0xFE, 0x7E, 0x7F, 0x7F, 0x00, 0x01, 0x80]


def test_fused_multiply_add_rounds_once() -> None:
    """Against exact rational arithmetic, where rounding twice (product then sum, or fp64 then fp32) would differ."""
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(2000).astype(np.float32) for _ in range(2))
    z = (-x * y).astype(np.float32)  # cancels to the rounding error of the product
    tie = np.float32(1 + 2**-23)
    x, y = np.append(x, [tie, tie]), np.append(y, [np.float32(1 + 2**-12), np.float32(1 - 2**-12)])
    z = np.append(z, [np.float32(2**-60), np.float32(-(2**-60))])
    for actual, a, b, c in zip(fused_multiply_add(x, y, z), x, y, z, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        below, above = np.nextafter(actual, np.float32(-np.inf)), np.nextafter(actual, np.float32(np.inf))
        error = abs(Fraction(float(actual)) - exact)
        assert error <= abs(Fraction(float(below)) - exact)
        assert error <= abs(Fraction(float(above)) - exact)
