"""A layer's tensors and its baseline."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.layer import baseline
from fp8moe.bench.layer.baseline import bf16_layer
from tests.bench.support import CPU, LAYER_SHAPE, small_layer


def test_problem_is_random_and_repeatable() -> None:
    problem, same = small_layer(), small_layer()
    for tensor, twin in zip(
        (*problem.arguments.values(), problem.d_out), (*same.arguments.values(), same.d_out), strict=True
    ):
        assert torch.equal(tensor, twin)
        assert tensor.float().std() > 0.05
    assert problem.group_sizes == torch.bincount(problem.arguments["topk_ids"].flatten()).tolist()
    assert problem.arguments["topk_weights"].dtype is torch.float32
    assert list(problem.main_grads) == ["d_w_gate_up", "d_w_down"]


def by_loop(hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """fp32, expert by expert."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in range(w_down.shape[0]):
        gate, up = (hidden.float() @ w_gate_up[expert].float().t()).chunk(2, dim=1)
        weight = torch.where(ids == expert, weights, 0.0).sum(1, keepdim=True)
        total = total + (F.silu(gate) * up * weight) @ w_down[expert].float().t()
    return total


def test_the_baseline_is_the_layer() -> None:
    problem = small_layer()
    expected = problem.products(lambda *arguments: by_loop(*arguments).bfloat16())
    variant = bf16_layer(CPU)
    found = problem.products(variant.op)
    assert (variant.name, variant.is_ours) == ("BF16", False)
    assert list(found) == ["out", "d_hidden", "d_topk_weights", "d_w_gate_up", "d_w_down"]
    for name, product in found.items():
        assert product.dtype == expected[name].dtype
        noise = (product.float() - expected[name].float()).square().sum()
        assert 10 * torch.log10(expected[name].float().square().sum() / noise) > 40


def test_what_is_compiled_is_what_runs_between_the_products() -> None:
    compiled = []

    def compile_(function: baseline.Function) -> baseline.Function:
        def run(*tensors: Tensor) -> object:
            compiled.append(function)
            return function(*tensors)

        return run

    small_layer().products(baseline._variant(compile_, "").op)
    assert compiled == [baseline.swiglu, baseline.sum_rows, baseline.swiglu_backward, baseline.sum_rows]


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_the_compiled_baseline_computes_the_same_again_and_again() -> None:
    """Traced as a GPU's is, but for the last step, which makes kernels."""
    problem = small_layer()
    expected = problem.products(bf16_layer(CPU).op)
    compiled = baseline._variant(torch.compile(backend="aot_eager", fullgraph=True, dynamic=False), "")
    for _ in range(2):
        out = problem.forward(compiled.op)
        for _ in range(2):
            gradients = problem.backward(out, keep_graph=True)
            for name, product in {"out": out, **gradients}.items():
                torch.testing.assert_close(product, expected[name], rtol=0.02, atol=0.02)


def test_a_gradient_that_is_missing_is_told() -> None:
    problem = small_layer()
    op = bf16_layer(CPU).op
    with pytest.raises(WrongResultError, match="d_hidden is missing: the output does not depend on its input"):
        problem.products(lambda hidden, *rest: op(hidden.detach(), *rest))


def test_gradients_are_compared_by_token_and_by_expert() -> None:
    problem = small_layer()
    products = problem.products(bf16_layer(CPU).op)
    shapes = {name: tuple(product.shape) for name, product in problem.compared(products).items()}
    t, k, h, i, e = LAYER_SHAPE.sizes
    assert shapes == {
        "out": (t, h), "d_hidden": (t, h), "d_topk_weights": (t * k,),
        "d_w_gate_up": (e, 2 * i * h), "d_w_down": (e, h * i),
    }  # fmt: skip
