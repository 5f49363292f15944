"""The dense product equals its definition: exact sums, scaled once."""

import itertools

import pytest
import torch

from fp8moe.int8 import int8_scaled_mm
from fp8moe.int8.scaled_mm import scaled_mm_in_fp64
from fp8moe.kernels.int8.platform import HOPPER, NVIDIA, PORTABLE, platform_of, scaled_tile
from fp8moe.kernels.int8.scaled_mm import launch_int8_scaled_mm
from tests.generators import FLOAT_DTYPES


def operands(m: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return a, w.t(), torch.rand(m, device=device) + 0.1, torch.rand(n, device=device) + 0.1


def product(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None,
    out_dtype: torch.dtype, in_fp16: bool = False,
) -> torch.Tensor:  # fmt: skip
    out = torch.full((a.shape[0], b.shape[1]), torch.nan, dtype=out_dtype, device=a.device)
    block_rows, tile = scaled_tile(platform_of(a.device), a.shape[0], b.shape[1], a.shape[1])
    launch_int8_scaled_mm(a, b.t(), a_scale, b_scale, bias, out, block_rows=block_rows, tile=tile, in_fp16=in_fp16)
    return out


@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 256), (16, 130, 40), (33, 1, 257), (129, 128, 96)])
@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_equals_definition(device: torch.device, m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    a, b, a_scale, b_scale = operands(m, n, k, device)
    for bias in (None, torch.randn(n, device=device) * 100):
        given = a, b, a_scale, b_scale, bias
        expected = scaled_mm_in_fp64(*given, out_dtype)
        assert torch.equal(product(*given, out_dtype), expected)
        assert torch.equal(product(*given, out_dtype, in_fp16=True), expected)


def test_sums_are_exact(device: torch.device) -> None:
    """The largest ones too: with scales of 1 fp32 rounds the integers once."""
    a, b, *_ = operands(20, 32, 1000, device)
    a[0], b[:, 0] = 127, -127
    ones = torch.ones(32, device=device)
    out = product(a, b, ones[:20], ones, None, torch.float32)
    expected = a.cpu().long() @ b.cpu().long()
    assert int(expected[0, 0]) == -127 * 127 * 1000
    assert torch.equal(out.cpu(), expected.float())


def test_rows_of_wider_matrices(device: torch.device) -> None:
    a, b, a_scale, b_scale = operands(40, 64, 96, device)
    wide, tall = (torch.zeros(rows, 200, dtype=torch.int8, device=device) for rows in (40, 64))
    wide[:, 50:146], tall[:, 10:106] = a, b.t()
    out = product(wide[:, 50:146], tall[:, 10:106].t(), a_scale, b_scale, None, torch.float32)
    assert torch.equal(out, product(a, b, a_scale, b_scale, None, torch.float32))


def test_tiles_fit_into_the_shared_memory_of_every_platform() -> None:
    for platform, m, n, k in itertools.product(
        (HOPPER, NVIDIA, PORTABLE), (1, 16, 17, 32, 33, 64, 65, 4096), (16, 1024, 4096, 16384), (40, 96, 256, 4096)
    ):
        block_rows, tile = scaled_tile(platform, m, n, k)
        assert tile.stages * (block_rows + tile.rows) * tile.block_k <= platform.shared_bytes
        assert tile.stages > 1


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 256, 1023, 2048, 4096, 8192])
@pytest.mark.parametrize("n", [128, 1024, 4096])
@pytest.mark.parametrize("k", [256, 512, 1024, 4096])
def test_sizes_of_models(m: int, n: int, k: int) -> None:
    a, b, a_scale, b_scale = operands(m, n, k, torch.device("cuda"))
    bias = torch.randn(n, device="cuda")
    for out_dtype in FLOAT_DTYPES:
        expected = scaled_mm_in_fp64(a, b, a_scale, b_scale, None, out_dtype)
        assert torch.equal(int8_scaled_mm(a, b, a_scale, b_scale, None, out_dtype), expected)
        assert torch.equal(
            int8_scaled_mm(a.t().contiguous().t(), b.contiguous(), a_scale, b_scale, None, out_dtype), expected
        )
        expected = scaled_mm_in_fp64(a, b, a_scale, b_scale, bias, out_dtype)
        # Once in some hundred million elements fp64 rounds to the middle between two fp32 numbers.
        out = int8_scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
        torch.testing.assert_close(out, expected, rtol=torch.finfo(out_dtype).eps, atol=0)
