"""What every FP8 backend of a Hopper GPU promises: the emulation's results, the same bits every time, no waiting."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, ScaleFormat
from tests.generators import offsets
from tests.gpu.support import emulation_of, no_synchronization, poison_free_memory, problem
from tests.measures import assert_same_bits, sqnr, worst_row_sqnr
from tests.test_grouped_mm import RAGGED, fp8, run

pytestmark = pytest.mark.gpu


def assert_agree(config: FP8Config, problem_: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Output and gradients equal the emulation's but for the order of sums; zeros where there is nothing to add up."""
    poison_free_memory()
    actual = run(fp8(config), *problem_)
    used = int(problem_[2][-1])
    sizes = torch.diff(problem_[2], prepend=problem_[2].new_zeros(1))
    for mine, reference in zip(actual, run(fp8(emulation_of(config)), *problem_), strict=True):
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
def test_agrees_with_the_emulation(config: FP8Config, scale_format: ScaleFormat, dtype: torch.dtype) -> None:
    assert_agree(replace(config, scale_format=scale_format), problem(RAGGED, unused_rows=60, dtype=dtype))


@pytest.mark.parametrize(
    "sizes",
    [[0, 0], [1], [63], [64], [65], [127], [128], [129], [500], [0, 0, 300, 0], [3] * 64, [1] * 256, [1000] * 40],
    ids=lambda sizes: str(sizes[:8]),
)
def test_edges(config: FP8Config, sizes: list[int]) -> None:
    assert_agree(config, problem(sizes))


@pytest.mark.parametrize(("num_experts", "n", "k"), [(6, 384, 256), (3, 384, 384), (40, 128, 384)])
def test_a_thousand_random_routings_each(config: FP8Config, num_experts: int, n: int, k: int) -> None:
    """Skewed, with empty groups, aligned, on one expert, with rows of no group; the sizes are on the device alone."""
    num_tokens = 2000
    a, w, _, dout = problem([num_tokens] + [0] * (num_experts - 1), n, k)
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(num_experts, generator=generator) ** (seed % 5 * 3)
        shares *= torch.rand(num_experts, generator=generator) < (1.0, 0.5, 0.2)[seed % 3]
        sizes = (shares / shares.sum().clamp(min=1e-9) * num_tokens).long()
        if seed % 4 == 0:
            sizes = sizes // 128 * 128
        assert_agree(config, (a, w, offsets(sizes.tolist(), "cuda"), dout))


def test_against_fp64_on_sampled_tiles(config: FP8Config) -> None:
    a, w, offs, dout = problem([1000, 0, 1500, 1596], 512, 1024)
    out, da, dw = run(fp8(config), a, w, offs, dout)
    for start, end, expert in ((0, 1000, 0), (1000, 2500, 2), (2500, 4096, 3)):
        rows = slice(start, end)
        assert sqnr(out[rows][:200], a[rows][:200].double() @ w[expert].double().t()) >= 27
        assert sqnr(da[rows][-200:], dout[rows][-200:].double() @ w[expert].double()) >= 26
        assert sqnr(dw[expert, :100], dout[rows][:, :100].double().t() @ a[rows].double()) >= 26


def test_same_bits_every_time(config: FP8Config) -> None:
    problem_ = problem([700, 0, 130, 1, 3000], 768, 512)
    first = run(fp8(config), *problem_)
    for _ in range(20):
        poison_free_memory()
        for again, one in zip(run(fp8(config), *problem_), first, strict=True):
            assert_same_bits(again, one)


@pytest.mark.parametrize("frozen", ["a", "w"])
def test_frozen_inputs(config: FP8Config, frozen: str) -> None:
    a, w, offs, dout = problem(RAGGED)
    expected = run(fp8(config), a, w, offs, dout)
    a.requires_grad_(frozen == "w")
    w.requires_grad_(frozen == "a")
    fp8(config)(a, w, offs).backward(dout)
    gradient, other = (w.grad, expected[2]) if frozen == "a" else (a.grad, expected[1])
    assert gradient is not None
    assert_same_bits(gradient, other)


def test_autocast(config: FP8Config) -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    a.requires_grad_()
    w.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = fp8(config)(a, w, offs)
    out.backward(dout.bfloat16())
    assert out.dtype == torch.bfloat16
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert sqnr(w.grad, run(fp8(emulation_of(config)), a, w, offs, dout)[2]) >= 35


def test_never_synchronizes(config: FP8Config) -> None:
    problem_ = problem(RAGGED, unused_rows=9)
    run(fp8(config), *problem_)  # compile
    with no_synchronization():
        run(fp8(config), *problem_)


def test_forward_and_backward_replay_in_a_graph_with_other_routing(config: FP8Config) -> None:
    a, w, offs, dout = problem([100] * 5)
    run(fp8(config), a, w, offs, dout)  # compile
    a.requires_grad_()
    w.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8(config)(a, w, offs)
        captured = (out, *torch.autograd.grad(out, (a, w), dout))
    for seed in range(100):
        cuts = torch.randint(0, 501, (4,), generator=torch.Generator().manual_seed(seed)).sort().values
        offs.copy_(torch.cat([cuts, torch.tensor([500 - seed % 7])]).cummax(0).values)
        for buffer in captured:
            buffer.detach().fill_(torch.nan)
        graph.replay()
        for replayed, eager in zip(captured, run(fp8(config), a, w, offs, dout), strict=True):
            assert_same_bits(replayed.detach(), eager)


@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of what they do themselves
def test_compiles_whole(config: FP8Config) -> None:
    problem_ = problem(RAGGED)

    def layer(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a * 2, w.transpose(-2, -1), offs, config=config) + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(run(compiled, *problem_), run(layer, *problem_), strict=True):
        assert sqnr(actual, expected) >= 45
