"""Layers with any gate, biases, orders of weights and sizes on a GPU: kernels, emulation and the plain layer agree."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage, FP8Config, Gate, KernelPreference, ScaleFormat
from tests.gpu.support import no_synchronization
from tests.kernels.support import needs_hopper
from tests.measures import assert_same_bits, sqnr
from tests.test_gates import CASES, Case, arguments, ids, plain, products, tensors, topk_ids

pytestmark = [
    pytest.mark.gpu,
    needs_hopper,
    # A thread of autograd, the first time that it multiplies.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

TRITON, EMULATED = (FP8Config(kernel_preference=p) for p in (KernelPreference.TRITON, KernelPreference.EMULATED))


def on_gpu(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    x = {name: value.detach().cuda().requires_grad_() for name, value in tensors(case).items()}
    return x, topk_ids(dropping=True).cuda()


def of(config: FP8Config, case: Case, x: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return products(lambda: fp8moe.moe_forward(topk_ids=chosen, config=config, **arguments(case, x)), x)


def products_on_gpu(case: Case, x: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return products(lambda: plain(case, x, chosen), x)


@ids([case for case in CASES if case.intermediate > 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_format": ScaleFormat.POW2},
        {"wgrad_token_tile": 128},
        {"wgrad_token_tile": 256},
        {"activation_storage": ActivationStorage.FP8},
    ],
    ids=str,
)
def test_kernels_compute_what_the_emulation_does(case: Case, options: dict[str, Any]) -> None:
    x, chosen = on_gpu(case)
    actual = of(replace(TRITON, **options), case, x, chosen)
    expected = of(replace(EMULATED, **options), case, x, chosen)
    exact = products_on_gpu(case, x, chosen)
    for name, value in actual.items():
        assert value.isfinite().all(), name
        assert sqnr(value, expected[name]) >= 32, (name, sqnr(value, expected[name]))
        assert sqnr(value, exact[name]) >= 17, (name, sqnr(value, exact[name]))


@ids([case for case in CASES if case.name in ("gpt-oss", "gemma")])
def test_replayed_with_other_routing_in_a_cuda_graph(case: Case) -> None:
    x, chosen = on_gpu(case)
    given = arguments(case, {name: value.detach() for name, value in x.items()})

    def layer() -> Tensor:
        return fp8moe.moe_forward(topk_ids=chosen, config=TRITON, **given)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    chosen.copy_(topk_ids())
    graph.replay()
    assert_same_bits(out.clone(), layer())


def test_no_synchronization() -> None:
    case = CASES[0]
    x, chosen = on_gpu(case)
    of(TRITON, case, x, chosen)
    given = arguments(case, x)
    with no_synchronization():
        out = fp8moe.moe_forward(topk_ids=chosen, config=TRITON, **given)
        out.backward(torch.ones_like(out))
    assert x["b_gate_up"].grad is not None
    assert x["b_gate_up"].grad.count_nonzero() > 0


def test_gpt_oss_at_full_width() -> None:
    case = Case("full", Gate.clamped_swiglu(7.0, 1.702, 1.0), CASES[0].formula, 2880, 2880, True, True, True)
    x, chosen = on_gpu(case)
    actual, expected = of(TRITON, case, x, chosen), of(EMULATED, case, x, chosen)
    for name, value in actual.items():
        assert sqnr(value, expected[name]) >= 32, (name, sqnr(value, expected[name]))
