"""The library's own GEMMs on a Hopper GPU, against the emulation."""

import pytest
import torch

from fp8moe import FP8Config, KernelPreference, ScaleFormat
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm, _k_grouped_into
from fp8moe.groups import TokenGroups
from fp8moe.operands import RowOperand, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import quantize_tokens
from tests.generators import offsets
from tests.gpu.support import lacks, problem
from tests.gpu.test_backends import assert_agree
from tests.measures import assert_same_bits, sqnr

TRITON = FP8Config(kernel_preference=KernelPreference.TRITON)
LACKS = lacks(KernelPreference.TRITON)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(LACKS), reason=LACKS)]


@pytest.mark.parametrize(("n", "k"), [(128, 128), (384, 640), (640, 384), (256, 1152), (2048, 128)])
def test_sizes_that_the_tile_does_not_divide(n: int, k: int) -> None:
    assert_agree(TRITON, problem([200, 0, 130, 513], n, k, unused_rows=7))


def token_operands(sizes: list[int], n: int, k: int) -> tuple[TokenOperand, TokenOperand, TokenGroups]:
    """Operands of wgrad for output gradients `(M, N)` and activations `(M, K)`."""
    groups = TokenGroups.from_offs(offsets(sizes, "cuda"), sum(sizes))
    lhs, rhs = (
        quantize_tokens(
            torch.randn(sum(sizes), features, device="cuda"), groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE
        )
        for features in (n, k)
    )
    return lhs, rhs, groups


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accumulates_into_a_buffer(dtype: torch.dtype) -> None:
    lhs, rhs, groups = token_operands([300, 0, 129, 1000, 1], 384, 640)
    product = Emulated().k_grouped(lhs, rhs, groups, torch.float32)
    before = torch.randn_like(product).to(dtype) * product.std()
    into = before.clone()
    _k_grouped_into(lhs.data, lhs.scale.t(), rhs.data, rhs.scale.t(), groups.padded_ends, into, accumulate=True)
    assert_same_bits(into[1], before[1])
    expected = (before.float() + product).to(dtype)
    assert sqnr(into, expected) >= (70 if dtype == torch.float32 else 45)  # sums in another order


def test_more_elements_than_32_bits_count() -> None:
    """Operand, weight and output each pass 2**31 elements; sampled rows against the dequantized product."""
    sizes, n, k = [0] * 6 + [70_000, 62_000], 17_408, 16_896
    num_tokens = sum(sizes)
    groups = TokenGroups.from_offs(offsets(sizes, "cuda"), num_tokens)
    lhs = RowOperand.empty(groups.capacity, k, torch.device("cuda"))
    lhs.data.view(torch.uint8).random_(0, 0x7E)
    lhs.scale.fill_(0.01)
    weight = torch.empty(len(sizes), n, k, dtype=torch.float8_e4m3fn, device="cuda")
    weight.view(torch.uint8).random_(0, 0x7E)
    rhs = WeightOperand(weight, torch.full((len(sizes), n // 128, k // 128), 0.01, device="cuda"))
    out = TritonGemm().m_grouped(lhs, rhs, groups, torch.bfloat16)
    for token, expert in ((0, 6), (69_999, 6), (70_000, 7), (num_tokens - 1, 7)):
        row = lhs.data[groups.token_row[token]].double() * 0.01
        assert sqnr(out[token][-256:], (weight[expert, -256:].double() * 0.01) @ row) >= 40
