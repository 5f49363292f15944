"""`WeightCache` where it matters: fused optimizers on the GPU, CUDA graphs, no synchronization."""

import pytest
import torch
from torch import Tensor, nn

import fp8moe
from fp8moe import FP8Config, KernelPreference, WeightCache
from tests.generators import offsets
from tests.gpu.support import lacks, no_synchronization
from tests.measures import assert_same_bits
from tests.test_grouped_mm import RAGGED

# The emulation can neither be captured nor spare a synchronization.
LACKS = lacks(KernelPreference.TRITON)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(LACKS), reason=LACKS)]
TRITON = FP8Config(kernel_preference=KernelPreference.TRITON)


class Problem:
    """One layer and its optimizer."""

    def __init__(self) -> None:
        self.a = torch.randn(500, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.w = nn.Parameter(torch.randn(5, 384, 256, device="cuda"))
        self.offs = offsets(RAGGED, "cuda")
        self.dout = torch.randn(500, 384, device="cuda", dtype=torch.bfloat16)
        self.cache = WeightCache(self.w)
        self.optimizer = torch.optim.Adam([self.w], lr=0.05, fused=True)

    def products(self, cache: WeightCache | None) -> tuple[Tensor, ...]:
        """Output, and gradients of `a` and `w`."""
        out = fp8moe.grouped_mm(self.a, self.w.transpose(-2, -1), self.offs, config=TRITON, weight_cache=cache)
        return (out.detach(), *torch.autograd.grad(out, (self.a, self.w), self.dout))

    def step(self, gradient: Tensor) -> None:
        self.w.grad = gradient
        self.optimizer.step()

    def assert_equal_without_cache(self, products: tuple[Tensor, ...]) -> None:
        for with_cache, without in zip(products, self.products(None), strict=True):
            assert_same_bits(with_cache, without)


def test_fused_steps_are_seen_without_synchronizing() -> None:
    problem = Problem()
    problem.step(problem.products(problem.cache)[2])  # compile, and the optimizer's state
    for _ in range(3):
        version = problem.w._version
        with no_synchronization():
            first, second = problem.products(problem.cache), problem.products(problem.cache)
            problem.step(first[2].clone())
        assert problem.w._version == version
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
        problem.assert_equal_without_cache(problem.products(problem.cache))


@pytest.mark.parametrize("state", ["fresh", "stale"])
def test_replays_read_the_weights_of_the_last_step(state: str) -> None:
    problem = Problem()
    problem.step(problem.products(problem.cache)[2])  # compile, and the optimizer's state
    if state == "fresh":
        problem.products(problem.cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.products(problem.cache)
    for _ in range(3):
        for buffer in captured:
            buffer.fill_(torch.nan)
        graph.replay()
        problem.assert_equal_without_cache(captured)
        problem.assert_equal_without_cache(problem.products(problem.cache))
        problem.step(captured[2].clone())


def test_replays_see_writes_that_nobody_counts() -> None:
    problem = Problem()
    problem.products(problem.cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.products(problem.cache)
    for write in (problem.w.data.copy_, torch.utils.dlpack.from_dlpack(problem.w.detach()).copy_):
        write(torch.randn_like(problem.w))
        graph.replay()
        problem.assert_equal_without_cache(captured)
    problem.w.data[0, 1, 1] = 1e4  # beside what is sampled
    problem.cache.invalidate()
    graph.replay()
    problem.assert_equal_without_cache(captured)


def test_nothing_is_quantized_while_nothing_changes() -> None:
    problem = Problem()
    problem.products(problem.cache)
    problem.cache._operands[1].view(torch.uint8).fill_(0)  # forward's codes, behind its back
    assert (problem.products(problem.cache)[0] == 0).all()
    problem.step(torch.zeros_like(problem.w))
    problem.assert_equal_without_cache(problem.products(problem.cache))


def test_a_whole_step_in_one_graph() -> None:
    problem = Problem()
    problem.optimizer = torch.optim.Adam([problem.w], lr=0.05, capturable=True)
    problem.step(problem.products(problem.cache)[2])
    problem.products(problem.cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.products(problem.cache)
        problem.step(captured[2])
    for _ in range(3):
        expected = problem.products(None)
        graph.replay()
        for actual, other in zip(captured, expected, strict=True):
            assert_same_bits(actual, other)
