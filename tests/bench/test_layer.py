"""A layer's tensors and its baseline."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fp8moe.bench.guard import WrongResultError, check
from fp8moe.bench.layer import baseline
from fp8moe.bench.layer.baseline import activation_of, bf16_layers, eager_layer, fused_layer
from fp8moe.bench.layer.experts import GPT_OSS, PLAIN, Experts
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import in_use
from fp8moe.bench.problem import Op
from fp8moe.bench.shapes import Shape
from fp8moe.gate import Gate
from tests.bench.support import CPU, GPT_OSS_SHAPE, LAYER_SHAPE, small_layer


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


def by_loop(hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *biases: Tensor) -> Tensor:
    """fp32, expert by expert; with biases gpt-oss's."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in range(w_down.shape[0]):
        x = hidden.float() @ w_gate_up[expert].float().t()
        if biases:
            x = x + biases[0][expert].float()
            gate, up = x[:, 0::2].clamp(max=7.0), x[:, 1::2].clamp(-7.0, 7.0)
            act = gate * torch.sigmoid(1.702 * gate) * (up + 1.0)
        else:
            gate, up = x.chunk(2, dim=1)
            act = F.silu(gate) * up
        out = act @ w_down[expert].float().t()
        out = out + biases[1][expert].float() if biases else out
        total = total + out * torch.where(ids == expert, weights, 0.0).sum(1, keepdim=True)
    return total


@pytest.mark.parametrize("way", [eager_layer, fused_layer])
@pytest.mark.parametrize(
    ("shape", "experts"), [(LAYER_SHAPE, PLAIN), (GPT_OSS_SHAPE, GPT_OSS)], ids=["plain", "gpt-oss"]
)
def test_each_way_is_the_layer(way: Callable[[Experts], Op], shape: Shape, experts: Experts) -> None:
    problem = small_layer(shape)
    expected = problem.products(lambda *arguments: by_loop(*arguments).bfloat16())
    found = problem.products(way(experts))
    assert list(found) == list(expected)
    for name, product in found.items():
        assert product.dtype == expected[name].dtype
        noise = (product.float() - expected[name].float()).square().sum()
        assert 10 * torch.log10(expected[name].float().square().sum() / noise) > (30 if "d_b" in name else 40)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
def test_without_a_gpu_there_is_the_eager_way_alone() -> None:
    assert [(variant.name, variant.is_ours) for variant in bf16_layers(PLAIN, CPU)] == [
        ("BF16 eager", False), ("BF16 eager main_grad", False),
    ]  # fmt: skip
    ways = bf16_layers(PLAIN, torch.device("cuda"))  # nothing is compiled before it is called
    names = ["BF16 eager", "BF16 compiled SwiGLU", "BF16 compiled"]
    assert [variant.name for variant in ways] == [f"{name}{into}" for name in names for into in ("", " main_grad")]


def test_a_gate_that_no_measured_layer_has() -> None:
    with pytest.raises(ValueError, match=r"experts is Experts\(.*it must have plain SwiGLU, or clamped SwiGLU"):
        activation_of(Experts(Gate.geglu_tanh()))


def test_what_is_compiled_is_what_runs_between_the_products() -> None:
    compiled = []

    def compile_(function: baseline.Function) -> baseline.Function:
        def run(*tensors: Tensor) -> object:
            compiled.append(function.__name__)
            return function(*tensors)

        return run

    small_layer().products(fused_layer(PLAIN, compile_))
    assert compiled == ["weighted", "sum_rows", "weighted_backward", "sum_rows"]


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("shape", [LAYER_SHAPE, GPT_OSS_SHAPE], ids=["plain", "gpt-oss"])
def test_what_is_compiled_computes_the_same_again_and_again(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as a GPU's is, but for the last step, which makes kernels."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    problem = small_layer(shape)
    expected = problem.products(LAYER.reference(shape))
    for variant in LAYER.baselines(shape, torch.device("cuda")):
        for _ in range(2):
            with in_use(variant, problem) as (forward, backward):
                out = forward()
                found = problem.compared({"out": out.detach(), **backward(out)})
                for name, product in problem.compared(expected).items():
                    check(name, found[name].to(product.dtype), product, min_sqnr_db=30)
    assert counter.frame_count == 5  # one of the whole layer, and one of each part: no use compiles anew


def test_a_gradient_that_is_missing_is_told() -> None:
    problem = small_layer()
    op = eager_layer(PLAIN)
    with pytest.raises(WrongResultError, match="d_hidden is missing: the output does not depend on its input"):
        problem.products(lambda hidden, *rest: op(hidden.detach(), *rest))


def test_gradients_are_compared_by_token_and_by_expert() -> None:
    problem = small_layer()
    products = problem.products(eager_layer(PLAIN))
    shapes = {name: tuple(product.shape) for name, product in problem.compared(products).items()}
    t, k, h, i, e = LAYER_SHAPE.sizes
    assert shapes == {
        "out": (t, h), "d_hidden": (t, h), "d_topk_weights": (t * k,),
        "d_w_gate_up": (e, 2 * i * h), "d_w_down": (e, h * i),
    }  # fmt: skip
