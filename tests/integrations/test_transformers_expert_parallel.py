"""`ep_implementation="fp8moe"`, on one rank."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fp8moe import FP8Config, ScaleFormat
from fp8moe.distributed import Dispatch
from tests.integrations.transformers_support import hf, qwen_experts, routed, run
from tests.measures import assert_same_bits, sqnr

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def parallel(experts: Any, mesh: DeviceMesh, name: str = "fp8moe") -> Any:
    """As transformers makes it of a module."""
    known = hf.expert_parallel.EPImplementationInterface()
    module = copy.deepcopy(experts)
    module.forward = known[name](module, mesh, mesh)
    return module


@pytest.mark.parametrize(("dispatch", "decibels"), [(Dispatch.FP8, 35), (Dispatch.BF16, 26)])
def test_is_the_layer_itself(mesh: DeviceMesh, dispatch: Dispatch, decibels: float) -> None:
    """In BF16, fp32 tokens are rounded twice."""
    hf.register(config=FP8Config(scale_format=ScaleFormat.POW2), dispatch=dispatch)
    experts, inputs = qwen_experts(), routed()
    for actual, expected in zip(run(parallel(experts, mesh), *inputs), run(experts, *inputs), strict=True):
        assert sqnr(actual, expected) >= decibels


def test_the_options_of_now_count(mesh: DeviceMesh) -> None:
    module, inputs = parallel(qwen_experts(), mesh), routed()
    before = module(*inputs)
    hf.register(dispatch=Dispatch.BF16)
    other = module(*inputs)
    assert (before != other).any()
    hf.register()
    assert_same_bits(module(*inputs), before)


def test_whichever_implementation_the_experts_have(mesh: DeviceMesh) -> None:
    inputs = routed()
    ours, theirs = (parallel(qwen_experts(name), mesh) for name in ("fp8moe", "grouped_mm"))
    assert_same_bits(theirs(*inputs), ours(*inputs))
    assert hf.report(theirs).experts[0].runs == "fp8moe in FP8"
    assert hf.report(theirs).experts[0].why.endswith("tokens travel to their ranks in FP8")


def test_what_fp8moe_cannot_compute(mesh: DeviceMesh) -> None:
    experts, inputs = qwen_experts("grouped_mm"), routed()
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.LayerNorm(128)
    module = parallel(experts, mesh)
    with pytest.warns(UserWarning, match="fp8moe cannot compute Qwen3MoeExperts, grouped_mm does: it normalizes"):
        out = module(*inputs)
    assert sqnr(out, experts(*inputs)) >= 60
    hf.register(strict=True)
    with pytest.raises(ValueError, match="fp8moe cannot compute Qwen3MoeExperts: it normalizes"):
        module(*inputs)


def test_names_and_options_that_are_none() -> None:
    for name in ("auto", "all_reduce"):
        with pytest.raises(ValueError, match=f"name is '{name}', which transformers uses itself"):
            hf.register(name)
    with pytest.raises(TypeError, match=r"dispatch is 'fp8'; it must be a fp8moe\.distributed\.Dispatch"):
        hf.register(dispatch="fp8")


def test_no_tokens(mesh: DeviceMesh) -> None:
    hidden, ids, weights = (x[:0] for x in routed())
    out = parallel(qwen_experts(), mesh)(hidden, ids, weights)
    assert out.shape == (0, 128)
    (gradient,) = torch.autograd.grad(out.sum(), hidden, allow_unused=True)
    assert gradient is None or gradient.shape == (0, 128)
