"""The DeepGEMM backend on a Hopper GPU, against the emulation."""

import itertools

import pytest
import torch

from fp8moe import BackendUnavailableError, FP8Config, KernelPreference
from tests.gpu.support import EMULATED, lacks, problem
from tests.gpu.test_backends import assert_agree
from tests.measures import sqnr
from tests.test_grouped_mm import RAGGED, fp8, run

DEEPGEMM = FP8Config(kernel_preference=KernelPreference.DEEPGEMM)
LACKS = lacks(KernelPreference.DEEPGEMM)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(LACKS), reason=LACKS)]


SIZES = [(384, 384), (256, 384), (384, 256), (256, 256), (128, 128), (640, 1152)]


@pytest.mark.parametrize(
    ("num_experts", "n", "k"),
    [(e, n, k) for e, (n, k) in itertools.product(range(1, 6), SIZES) if e in (1, 3) or n == k > 128],
)
def test_few_groups_and_odd_tile_counts(num_experts: int, n: int, k: int) -> None:
    """Where multicast could straddle groups. DeepGEMM compiles each of them, in several seconds."""
    assert_agree(DEEPGEMM, problem([200 + 90 * expert for expert in range(num_experts)], n, k))


@pytest.mark.parametrize(("n", "k"), [(200, 136), (127, 129), (720, 720)])
def test_any_size_where_no_weight_gets_a_gradient(n: int, k: int) -> None:
    a, w, offs, dout = problem(RAGGED, n, k, unused_rows=7)
    results = []
    for config in (DEEPGEMM, EMULATED):
        x = a.clone().requires_grad_()
        out = fp8(config)(x, w, offs)
        results.append((out.detach(), *torch.autograd.grad(out, x, dout)))
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        assert sqnr(mine, expected) >= 45
        assert (mine[500:] == 0).all()
    with pytest.raises(BackendUnavailableError, match=f"sizes {n} and {k}"):
        fp8(DEEPGEMM)(a, w.requires_grad_(), offs)


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
