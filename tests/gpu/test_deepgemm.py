"""The DeepGEMM backend on a Hopper GPU, against the emulation."""

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, KernelPreference, ScaleFormat
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.deepgemm import DeepGemm
from tests.generators import offsets
from tests.gpu.test_on_cuda import no_synchronization
from tests.measures import assert_same_bits, sqnr, worst_row_sqnr
from tests.test_grouped_mm import RAGGED, fp8, run

DEEPGEMM = FP8Config(kernel_preference=KernelPreference.DEEPGEMM)
EMULATED = FP8Config(kernel_preference=KernelPreference.EMULATED)


def lacks() -> str:
    """Why the backend cannot be tested here; empty if it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = {str(lack): None for gemm in Gemm for lack in DeepGemm().missing(gemm, device)}
    return " ".join(missing)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(lacks()), reason=lacks())]


def problem(
    sizes: list[int], n: int = 384, k: int = 256, unused_rows: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activation `(M, K)`, weight `(E, N, K)`, offsets and output gradient `(M, N)`, on the GPU."""
    num_tokens = sum(sizes) + unused_rows
    a = torch.randn(num_tokens, k, device="cuda").to(dtype)
    w = torch.randn(len(sizes), n, k, device="cuda").to(dtype)
    return a, w, offsets(sizes, "cuda"), torch.randn(num_tokens, n, device="cuda").to(dtype)


def poison_free_memory() -> None:
    """Leave NaN in what the allocator hands out next."""
    torch.full((1 << 28,), torch.nan, device="cuda")


def assert_agree(problem_: tuple[Tensor, Tensor, Tensor, Tensor], scale_format: ScaleFormat = ScaleFormat.FP32) -> None:
    poison_free_memory()
    deepgemm = FP8Config(kernel_preference=KernelPreference.DEEPGEMM, scale_format=scale_format)
    emulated = FP8Config(kernel_preference=KernelPreference.EMULATED, scale_format=scale_format)
    actual = run(fp8(deepgemm), *problem_)
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
    [[0, 0], [1], [127], [128], [129], [500], [0, 0, 300, 0], [3] * 64, [1] * 256],
    ids=lambda sizes: str(sizes[:8]),
)
def test_edges(sizes: list[int]) -> None:
    assert_agree(problem(sizes))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("n", "k"), [(384, 384), (256, 384), (384, 256), (256, 256), (128, 128), (640, 1152)])
def test_few_groups_and_odd_tile_counts(num_experts: int, n: int, k: int) -> None:
    """Where multicast could straddle groups."""
    assert_agree(problem([200 + 90 * expert for expert in range(num_experts)], n, k))


@pytest.mark.parametrize(("num_experts", "n", "k"), [(6, 384, 256), (3, 384, 384)])
def test_a_thousand_random_routings_each(num_experts: int, n: int, k: int) -> None:
    """Skewed, with empty groups, aligned, on one expert: the sizes are on the device alone, the host list is static."""
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


def test_against_fp64_on_sampled_tiles() -> None:
    a, w, offs, dout = problem([1000, 0, 1500, 1596], 512, 1024)
    out, da, dw = run(fp8(DEEPGEMM), a, w, offs, dout)
    for start, end, expert in ((0, 1000, 0), (1000, 2500, 2), (2500, 4096, 3)):
        rows = slice(start, end)
        assert sqnr(out[rows][:200], a[rows][:200].double() @ w[expert].double().t()) >= 27
        assert sqnr(da[rows][-200:], dout[rows][-200:].double() @ w[expert].double()) >= 26
        assert sqnr(dw[expert, :100], dout[rows][:, :100].double().t() @ a[rows].double()) >= 26


def test_same_bits_every_time() -> None:
    problem_ = problem([700, 0, 130, 1, 3000], 768, 512)
    first = run(fp8(DEEPGEMM), *problem_)
    for _ in range(20):
        poison_free_memory()
        for again, one in zip(run(fp8(DEEPGEMM), *problem_), first, strict=True):
            assert_same_bits(again, one)


@pytest.mark.parametrize("frozen", ["a", "w"])
def test_frozen_inputs(frozen: str) -> None:
    a, w, offs, dout = problem(RAGGED)
    expected = run(fp8(DEEPGEMM), a, w, offs, dout)
    a.requires_grad_(frozen == "w")
    w.requires_grad_(frozen == "a")
    fp8(DEEPGEMM)(a, w, offs).backward(dout)
    gradient, other = (w.grad, expected[2]) if frozen == "a" else (a.grad, expected[1])
    assert gradient is not None
    assert_same_bits(gradient, other)


def test_autocast() -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    a.requires_grad_()
    w.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = fp8(DEEPGEMM)(a, w, offs)
    out.backward(dout.bfloat16())
    assert out.dtype == torch.bfloat16
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert sqnr(w.grad, run(fp8(EMULATED), a, w, offs, dout)[2]) >= 35


def test_never_synchronizes() -> None:
    problem_ = problem(RAGGED, unused_rows=9)
    run(fp8(DEEPGEMM), *problem_)  # compile
    with no_synchronization():
        run(fp8(DEEPGEMM), *problem_)


def test_forward_and_backward_replay_in_a_graph_with_other_routing() -> None:
    a, w, offs, dout = problem([100] * 5)
    run(fp8(DEEPGEMM), a, w, offs, dout)  # compile
    a.requires_grad_()
    w.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8(DEEPGEMM)(a, w, offs)
        captured = (out, *torch.autograd.grad(out, (a, w), dout))
    for seed in range(100):
        cuts = torch.randint(0, 501, (4,), generator=torch.Generator().manual_seed(seed)).sort().values
        offs.copy_(torch.cat([cuts, torch.tensor([500 - seed % 7])]).cummax(0).values)
        for buffer in captured:
            buffer.detach().fill_(torch.nan)
        graph.replay()
        for replayed, eager in zip(captured, run(fp8(DEEPGEMM), a, w, offs, dout), strict=True):
            assert_same_bits(replayed.detach(), eager)


@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of what they do themselves
def test_compiles_whole() -> None:
    problem_ = problem(RAGGED)

    def layer(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a * 2, w.transpose(-2, -1), offs, config=DEEPGEMM) + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(run(compiled, *problem_), run(layer, *problem_), strict=True):
        assert sqnr(actual, expected) >= 45


def test_no_layout_transform_runs_inside_deepgemm() -> None:
    """The kernels of a forward and backward are the project's, DeepGEMM's three GEMMs, and small ones of the plan."""
    problem_ = problem(RAGGED, 512, 384)
    run(fp8(DEEPGEMM), *problem_)  # compile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run(fp8(DEEPGEMM), *problem_)
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() for _ in range(event.count)]
    deep_gemm = [name for name in kernels if "deep_gemm" in name]
    assert len(deep_gemm) == 3, deep_gemm
    assert all("fp8_gemm" in name for name in deep_gemm), deep_gemm
    assert not any("transpose" in name.lower() for name in kernels), kernels
