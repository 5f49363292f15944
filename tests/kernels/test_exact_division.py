"""The divisions that scales come from are correctly rounded for every mantissa: all 2**23 of them."""

import pytest
import torch
import triton
import triton.language as tl

from fp8moe.kernels.numerics import dequantization_scale, quantization_factor

BLOCK = 1 << 16


@triton.jit
def scales_of_mantissas(scale, factor, exponent_bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    mantissa = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amax = (mantissa | exponent_bits).to(tl.float32, bitcast=True)
    scale_ = dequantization_scale(amax, False)
    tl.store(scale + mantissa, scale_)
    tl.store(factor + mantissa, quantization_factor(amax, scale_, False))


@pytest.mark.parametrize("exponent", [-100, -1, 0, 1, 9, 126, 127])
def test_every_mantissa(device: torch.device, exponent: int) -> None:
    scale, factor = (torch.full((2**23,), torch.nan, device=device) for _ in range(2))
    exponent_bits = (exponent + 127) << 23
    scales_of_mantissas[(2**23 // BLOCK,)](scale, factor, exponent_bits, BLOCK=BLOCK)
    amax = (torch.arange(2**23, dtype=torch.int32) | exponent_bits).view(torch.float32)
    e4m3_max = torch.full_like(amax, 448.0)
    assert torch.equal(scale.cpu(), amax / e4m3_max)
    assert torch.equal(factor.cpu(), e4m3_max / amax)
