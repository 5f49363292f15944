"""The library's own GEMMs on a Hopper GPU, against the emulation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe import FP8Config, KernelPreference, ScaleFormat
from fp8moe.config import TOKEN_TILES
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm
from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import quantize_tokens
from fp8moe.rows.groups import plan_groups
from tests.generators import offsets
from tests.gpu.support import lacks, problem
from tests.gpu.test_backends import assert_agree
from tests.measures import assert_same_bits, sqnr, worst_row_sqnr
from tests.test_grouped_mm import fp8, run

TRITON = FP8Config(kernel_preference=KernelPreference.TRITON)
LACKS = lacks(KernelPreference.TRITON)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(LACKS), reason=LACKS)]


@pytest.mark.parametrize(("n", "k"), [(128, 128), (384, 640), (640, 384), (256, 1152), (2048, 128)])
def test_sizes_that_the_tile_does_not_divide(n: int, k: int) -> None:
    assert_agree(TRITON, problem([200, 0, 130, 513], n, k, unused_rows=7))


def token_operands(
    sizes: list[int], n: int, k: int, token_tile: int = 128
) -> tuple[TokenOperand, TokenOperand, TokenGroups]:
    """Operands of wgrad for output gradients `(M, N)` and activations `(M, K)`, these in tiles of `token_tile`."""
    groups = plan_groups(offsets(sizes, "cuda"), sum(sizes))
    lhs, rhs = (
        quantize_tokens(x, groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE, tile)
        for x, tile in (
            (torch.randn(sum(sizes), n, device="cuda"), 128),
            (activations(sum(sizes), k), token_tile),
        )
    )
    return lhs, rhs, groups


def activations(num_rows: int, num_features: int) -> Tensor:
    """Some features are dead, or differ by many powers of two, from one stretch of 512 tokens to another."""
    x = torch.randn(num_rows, num_features, device="cuda")
    stretch = torch.arange(num_rows, device="cuda") // 512
    x[:, ::7] *= (stretch % 2 == 0)[:, None]
    x[:, 1::7] *= 1e-12 ** (stretch % 3).float()[:, None]
    return x


@pytest.mark.parametrize("token_tile", [256, 512])
@pytest.mark.parametrize("sizes", [[300, 0, 129, 1000, 1], [2500, 640, 0, 2304]], ids=str)
@pytest.mark.parametrize(("n", "k"), [(384, 640), (128, 128), (256, 1152)])
def test_long_token_tiles(token_tile: int, sizes: list[int], n: int, k: int) -> None:
    lhs, rhs, groups = token_operands(sizes, n, k, token_tile)
    expected = Emulated().k_grouped(lhs, rhs, groups, torch.float32)
    for dtype, decibels in ((torch.float32, 70), (torch.bfloat16, 45), (torch.float16, 60)):  # sums in another order
        product = TritonGemm().k_grouped(lhs, rhs, groups, dtype)
        assert_same_bits(product, TritonGemm().k_grouped(lhs, rhs, groups, dtype))
        assert sqnr(product, expected) >= decibels
        if dtype != torch.float16:  # which has no such small numbers
            assert worst_row_sqnr(product.mT.flatten(0, 1), expected.mT.flatten(0, 1)) >= decibels - 15
        assert (product[torch.tensor(sizes) == 0] == 0).all()
    into = torch.ones_like(expected)
    TritonGemm().k_grouped_add(lhs, rhs, groups, into)
    assert sqnr(into, expected + 1) >= 70


def test_long_token_tile_of_nan_spreads_to_its_feature_alone() -> None:
    lhs, rhs, groups = token_operands([700, 300], 128, 256, 256)
    rhs.stored_scale[2:4, 5] = torch.nan
    rhs.data.view(torch.uint8)[5, 256:512] = 0x7F
    product = TritonGemm().k_grouped(lhs, rhs, groups, torch.float32)
    is_nan = product.isnan()
    assert is_nan[0, :, 5].all()
    assert is_nan.sum() == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accumulates_into_a_buffer(dtype: torch.dtype) -> None:
    lhs, rhs, groups = token_operands([300, 0, 129, 1000, 1], 384, 640)
    product = Emulated().k_grouped(lhs, rhs, groups, torch.float32)
    before = torch.randn_like(product).to(dtype) * product.std()
    into = before.clone()
    TritonGemm().k_grouped_add(lhs, rhs, groups, into)
    assert_same_bits(into[1], before[1])
    expected = (before.float() + product).to(dtype)
    assert sqnr(into, expected) >= (70 if dtype == torch.float32 else 45)  # sums in another order


@pytest.mark.large
def test_more_elements_than_32_bits_count() -> None:
    """Operand, weight and output each pass 2**31 elements; sampled rows against the dequantized product."""
    sizes, n, k = [0] * 6 + [70_000, 62_000], 17_408, 16_896
    num_tokens = sum(sizes)
    groups = plan_groups(offsets(sizes, "cuda"), num_tokens)
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


def test_ten_thousand_random_routings() -> None:
    """A row's products depend on its expert alone, so their bits are known; the weight gradient is near BF16's.

    FP8's own noise is at 28 dB; a block of 128 tokens lost or counted twice would be at 12 dB or less.
    """
    num_tokens, num_experts, n, k = 2000, 6, 384, 256
    a, w, _, dout = problem([num_tokens] + [0] * (num_experts - 1), n, k)
    all_on_one = [run(fp8(TRITON), a, w[[e]], offsets([num_tokens], "cuda"), dout) for e in range(num_experts)]
    zeros = [torch.zeros_like(all_on_one[0][0]), torch.zeros_like(all_on_one[0][1])]
    outs, das = (torch.stack([products[i] for products in all_on_one] + [zeros[i]]) for i in (0, 1))  # (E + 1, M, N)
    row = torch.arange(num_tokens, device="cuda")

    routings = []
    for seed in range(10_000):
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(num_experts, generator=generator) ** (seed % 5 * 3)
        shares *= torch.rand(num_experts, generator=generator) < (1.0, 0.5, 0.2)[seed % 3]
        sizes = (shares / shares.sum().clamp(min=1e-9) * (num_tokens - seed % 7 * 20)).long()
        routings.append(sizes // 128 * 128 if seed % 4 == 0 else sizes)
    all_offs = torch.stack(routings).cumsum(1).int().cuda()

    wrong = torch.zeros(4, dtype=torch.int64, device="cuda")
    configs = [replace(TRITON, wgrad_token_tile=token_tile) for token_tile in TOKEN_TILES]
    for number, offs in enumerate(all_offs):
        out, da, dw = run(fp8(configs[number % 3]), a, w, offs, dout)
        expert = torch.searchsorted(offs, row, right=True)
        size = torch.diff(offs, prepend=offs.new_zeros(1))[:, None]
        expected = F.grouped_mm(dout.t(), a, offs=offs).float().masked_fill((size == 0)[:, :, None], 0.0)
        noise = (dw.float() - expected).square().sum(2)
        wrong[0] += (out != outs[expert, row]).any()
        wrong[1] += (da != das[expert, row]).any()
        wrong[2] += ~(noise <= 10**-1.8 * expected.square().sum(2)).all()  # zeros for no tokens
        wrong[3] += (size > 0).any()
    assert wrong[:3].tolist() == [0, 0, 0]
    assert wrong[3] > 9000  # the routings are of tokens
