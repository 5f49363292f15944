"""The kernel moves each byte to where PyTorch moves it."""

import pytest
import torch

from fp8moe.kernels.transpose_codes import launch_transpose_codes
from fp8moe.quantize.transpose_codes import transpose_codes
from tests.measures import assert_same_bits


@pytest.mark.parametrize("shape", [(0, 128, 128), (1, 128, 128), (3, 384, 128), (2, 128, 256), (5, 256, 640)], ids=str)
def test_equals_pytorch(device: torch.device, shape: tuple[int, int, int]) -> None:
    codes = torch.randint(256, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    transposed = torch.full((shape[0], shape[2], shape[1]), 0xA5, dtype=torch.uint8, device=device)
    launch_transpose_codes(codes, transposed.view(torch.float8_e4m3fn))
    assert torch.equal(transposed, codes.view(torch.uint8).transpose(1, 2))
    assert_same_bits(transpose_codes(codes), transposed.view(torch.float8_e4m3fn))
    assert_same_bits(transpose_codes(transpose_codes(codes)), codes)


@pytest.mark.gpu
@pytest.mark.large
def test_more_elements_than_int32() -> None:
    codes = torch.randint(256, (33, 8192, 8192), dtype=torch.uint8, device="cuda")
    transposed = transpose_codes(codes.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert torch.equal(transposed, codes.transpose(1, 2))
