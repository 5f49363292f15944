"""Experts of Hugging Face transformers, quantized in one call."""

from typing import Any

import pytest
import torch

from fp8moe.int8 import int8_moe_forward, quantize_module

pytest.importorskip("transformers")
support: Any = pytest.importorskip("tests.integrations.transformers_support", exc_type=ImportError)


@torch.no_grad()
@pytest.mark.parametrize("build", ["qwen_experts", "aria_experts"])
def test_close_to_the_experts_own_forward(build: str) -> None:
    module = support.with_eager(getattr(support, build)())
    hidden, topk_ids, topk_weights = support.routed()
    out = int8_moe_forward(hidden.detach(), topk_ids, topk_weights, quantize_module(module, 8, 64))
    expected = module(hidden, topk_ids, topk_weights)
    assert (out - expected).norm() / expected.norm() < 0.02


def test_other_gates_are_refused() -> None:
    module = support.build_experts("gpt_oss", "GptOss", hidden_size=64, intermediate_size=64, num_local_experts=2)
    with pytest.raises(ValueError, match="has silu"):
        quantize_module(module)
