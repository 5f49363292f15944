"""The library's own GEMMs on a Hopper GPU, against the emulation."""

import pytest
import torch
from torch import Tensor

from fp8moe import FP8Config, KernelPreference, ScaleFormat
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm, _k_grouped_into
from fp8moe.groups import TokenGroups
from fp8moe.operands import RowOperand, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import quantize_tokens
from tests.generators import offsets
from tests.gpu.test_deepgemm import poison_free_memory, problem
from tests.gpu.test_on_cuda import no_synchronization
from tests.measures import assert_same_bits, sqnr, worst_row_sqnr
from tests.test_grouped_mm import RAGGED, fp8, run

TRITON = FP8Config(kernel_preference=KernelPreference.TRITON)


def lacks() -> str:
    """Why the backend cannot be tested here; empty if it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = {str(lack): None for gemm in Gemm for lack in TritonGemm().missing(gemm, device)}
    return " ".join(missing)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(lacks()), reason=lacks())]


def assert_agree(problem_: tuple[Tensor, Tensor, Tensor, Tensor], scale_format: ScaleFormat = ScaleFormat.FP32) -> None:
    poison_free_memory()
    triton = FP8Config(kernel_preference=KernelPreference.TRITON, scale_format=scale_format)
    emulated = FP8Config(kernel_preference=KernelPreference.EMULATED, scale_format=scale_format)
    actual = run(fp8(triton), *problem_)
    used = int(problem_[2][-1])
    sizes = torch.diff(problem_[2], prepend=problem_[2].new_zeros(1))
    for mine, reference in zip(actual, run(fp8(emulated), *problem_), strict=True):
        assert mine.dtype == reference.dtype
        assert mine.isfinite().all()
        if used > 0:
            assert sqnr(mine, reference) >= 45
            assert worst_row_sqnr(mine, reference) >= 35
    assert (actual[0][used:] == 0).all()
    assert (actual[1][used:] == 0).all()
    assert (actual[2][sizes == 0] == 0).all()


@pytest.mark.parametrize("scale_format", ScaleFormat)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_agrees_with_the_emulation(scale_format: ScaleFormat, dtype: torch.dtype) -> None:
    assert_agree(problem(RAGGED, unused_rows=60, dtype=dtype), scale_format)


@pytest.mark.parametrize(
    "sizes",
    [[0, 0], [1], [63], [64], [65], [127], [128], [129], [500], [0, 0, 300, 0], [3] * 64, [1] * 256, [1000] * 40],
    ids=lambda sizes: str(sizes[:8]),
)
def test_edges(sizes: list[int]) -> None:
    assert_agree(problem(sizes))


@pytest.mark.parametrize(("n", "k"), [(128, 128), (384, 640), (640, 384), (256, 1152), (2048, 128)])
def test_sizes_that_the_tile_does_not_divide(n: int, k: int) -> None:
    assert_agree(problem([200, 0, 130, 513], n, k, unused_rows=7))


@pytest.mark.parametrize(("num_experts", "n", "k"), [(6, 384, 256), (40, 128, 384)])
def test_a_thousand_random_routings_each(num_experts: int, n: int, k: int) -> None:
    """Skewed, with empty groups, aligned, on one expert, with rows of no group."""
    num_tokens = 2000
    a, w, _, dout = problem([num_tokens] + [0] * (num_experts - 1), n, k)
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(num_experts, generator=generator) ** (seed % 5 * 3)
        shares *= torch.rand(num_experts, generator=generator) < (1.0, 0.5, 0.2)[seed % 3]
        sizes = (shares / shares.sum().clamp(min=1e-9) * num_tokens).long()
        if seed % 4 == 0:
            sizes = sizes // 128 * 128
        assert_agree((a, w, offsets(sizes.tolist(), "cuda"), dout))


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


def test_same_bits_every_time() -> None:
    problem_ = problem([700, 0, 130, 1, 3000], 768, 512)
    first = run(fp8(TRITON), *problem_)
    for _ in range(20):
        poison_free_memory()
        for again, one in zip(run(fp8(TRITON), *problem_), first, strict=True):
            assert_same_bits(again, one)


def test_never_synchronizes() -> None:
    problem_ = problem(RAGGED, unused_rows=9)
    run(fp8(TRITON), *problem_)  # compile
    with no_synchronization():
        run(fp8(TRITON), *problem_)


def test_forward_and_backward_replay_in_a_graph_with_other_routing() -> None:
    a, w, offs, dout = problem([100] * 5)
    run(fp8(TRITON), a, w, offs, dout)  # compile
    a.requires_grad_()
    w.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8(TRITON)(a, w, offs)
        captured = (out, *torch.autograd.grad(out, (a, w), dout))
    for seed in range(100):
        cuts = torch.randint(0, 501, (4,), generator=torch.Generator().manual_seed(seed)).sort().values
        offs.copy_(torch.cat([cuts, torch.tensor([500 - seed % 7])]).cummax(0).values)
        for buffer in captured:
            buffer.detach().fill_(torch.nan)
        graph.replay()
        for replayed, eager in zip(captured, run(fp8(TRITON), a, w, offs, dout), strict=True):
            assert_same_bits(replayed.detach(), eager)


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
