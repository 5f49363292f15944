"""The expert MLP and the whole layer on a GPU, by each backend: right, repeatable, and never waiting for the device."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage, FP8Config, WeightCache
from fp8moe.config import TOKEN_TILES
from fp8moe.gemm.cost import Cost, CostModel, Costs
from fp8moe.gemm.tuning import decided_by
from tests.gpu.support import emulation_of, no_synchronization, poison_free_memory
from tests.measures import assert_same_bits, sqnr, worst_row_sqnr

T, K, E, H, I = 300, 4, 6, 512, 384  # noqa: E741

pytestmark = pytest.mark.gpu
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def problem(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hidden`, ids (a tenth of them skipped, one expert never chosen), weights, `w_gate_up`, `w_down`."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()

    ids = torch.randint(0, E - 1, (T, K), generator=generator, device="cuda")
    skipped = torch.rand(T, K, generator=generator, device="cuda") < 0.1
    weights = torch.rand(T, K, generator=generator, device="cuda").add(0.1).requires_grad_()
    w_gate_up, w_down = normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
    return normal(T, H), ids.masked_fill(skipped, -1), weights, w_gate_up, w_down


def layer_of(config: FP8Config) -> Layer:
    return lambda *args: fp8moe.moe_forward(*args, config=config)


def step(layer: Layer, problem_: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    """The output and the gradients of `hidden`, the router's weights, `w_gate_up` and `w_down`."""
    hidden, ids, weights, w_gate_up, w_down = problem_
    out = layer(hidden, ids, weights, w_gate_up, w_down)
    return [out, *torch.autograd.grad(out, (hidden, weights, w_gate_up, w_down), dout)]


@pytest.fixture
def in_bf16() -> Iterator[None]:
    """AUTO takes BF16, whatever the sizes."""
    costs = Costs(bf16=Cost(0, 0, 0, 0), fp8=Cost(1, 0, 0, 0), fp8_cached=Cost(1, 0, 0, 0))
    with decided_by(CostModel("", "", product=costs, layer=costs)):
        yield


@pytest.mark.usefixtures("in_bf16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bf16_route_reads_no_row_of_a_dropped_choice(dtype: torch.dtype) -> None:
    """Memory that nothing writes holds NaN, as does a token that no expert gets."""
    hidden, ids, weights, w_gate_up, w_down = problem(dtype=dtype)
    ids[4] = -1
    with torch.no_grad():
        hidden[4] = torch.nan
    dout = output_gradient().to(dtype)
    step(layer_of(FP8Config()), (hidden, ids, weights, w_gate_up, w_down), dout)  # compile kernels
    poison_free_memory()
    with no_synchronization():
        actual = step(layer_of(FP8Config()), (hidden, ids, weights, w_gate_up, w_down), dout)
    with torch.no_grad():
        hidden[4] = 0
    expected = step(in_fp32, (hidden, ids, weights, w_gate_up, w_down), dout.float())
    for mine, theirs in zip(actual, expected, strict=True):
        assert sqnr(mine, theirs) >= 38
    assert (actual[0][4] == 0).all()
    assert (actual[1][4] == 0).all()
    assert (actual[2][ids < 0] == 0).all()
    assert (actual[3][E - 1] == 0).all()
    repeated = step(layer_of(FP8Config()), (hidden, ids, weights, w_gate_up, w_down), dout)
    for mine, again in zip(actual, repeated, strict=True):
        assert_same_bits(mine, again)


def in_fp32(hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Expert by expert."""
    out = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in range(E):
        gate, up = (hidden.float() @ w_gate_up[expert].float().t()).chunk(2, dim=1)
        scale = (weights * (ids == expert)).sum(1, keepdim=True)
        out = out + (torch.nn.functional.silu(gate) * up * scale) @ w_down[expert].float().t()
    return out


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of the stream of the warm-up
@pytest.mark.usefixtures("in_bf16")
def test_the_bf16_route_replays_in_a_graph_with_other_routing() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    dout = output_gradient()

    def once() -> list[Tensor]:
        return step(layer_of(FP8Config()), (hidden, ids, weights, w_gate_up, w_down), dout)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for seed in (1, 2):
        ids.copy_(problem(seed)[1])
        graph.replay()
        for mine, theirs in zip(captured, once(), strict=True):
            assert_same_bits(mine, theirs)


def output_gradient(seed: int = 9) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


@pytest.mark.parametrize("storage", ActivationStorage)
@pytest.mark.parametrize("token_tile", [None, *TOKEN_TILES])
def test_agrees_with_the_emulation(config: FP8Config, storage: ActivationStorage, token_tile: int | None) -> None:
    config = replace(config, activation_storage=storage, wgrad_token_tile=token_tile)
    problem_, dout = problem(), output_gradient()
    poison_free_memory()
    actual, expected = (step(layer_of(each), problem_, dout) for each in (config, emulation_of(config)))
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert sqnr(mine, theirs) >= 35
    assert worst_row_sqnr(actual[0][:100], expected[0][:100]) >= 25
    assert not actual[3][E - 1].any()
    assert not actual[4][E - 1].any()


@pytest.mark.parametrize("token_tile", [None, 128, 512])
def test_repeats_bit_for_bit(config: FP8Config, token_tile: int | None) -> None:
    problem_, dout = problem(), output_gradient()
    config = replace(config, wgrad_token_tile=token_tile)
    first = step(layer_of(config), problem_, dout)
    for _ in range(5):
        poison_free_memory()
        for again, once in zip(step(layer_of(config), problem_, dout), first, strict=True):
            assert_same_bits(again, once)


@pytest.mark.parametrize("token_tile", [None, 128])
def test_never_synchronizes(config: FP8Config, token_tile: int | None) -> None:
    problem_, dout = problem(), output_gradient()
    config = replace(config, wgrad_token_tile=token_tile)
    step(layer_of(config), problem_, dout)  # compile
    with no_synchronization():
        step(layer_of(config), problem_, dout)


@pytest.mark.parametrize("token_tile", [None, 128, 512])
def test_a_graph_replays_with_other_routings(config: FP8Config, token_tile: int | None) -> None:
    config = replace(config, wgrad_token_tile=token_tile)
    problem_, dout = problem(), output_gradient()
    hidden, ids, weights, _, _ = problem_
    step(layer_of(config), problem_, dout)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [tensor.detach() for tensor in step(layer_of(config), problem_, dout)]
    for seed in range(100):
        other_hidden, other_ids, other_weights, _, _ = problem(seed + 1)
        with torch.no_grad():
            hidden.copy_(other_hidden)
            ids.copy_(other_ids)
            weights.copy_(other_weights)
        graph.replay()
        for replayed, eager in zip(captured, step(layer_of(config), problem_, dout), strict=True):
            assert_same_bits(replayed, eager)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of the streams of its own warm-up
def test_pytorch_makes_a_graphed_module(config: FP8Config) -> None:
    """One graph for forward and one for backward, for any routing: two launches from Python a step."""
    hidden, ids, weights, w_gate_up, w_down = problem()
    experts = fp8moe.SwiGLUExperts(E, H, I, config, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        experts.w_gate_up.copy_(w_gate_up)
        experts.w_down.copy_(w_down)
    eager = copy.deepcopy(experts)
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in (hidden, ids, weights))
    graphed: Any = torch.cuda.make_graphed_callables(experts, samples)
    dout = output_gradient()
    for seed in range(10):
        results: list[list[Any]] = []
        modules: tuple[Any, ...] = graphed, eager
        for module in modules:
            other, other_ids, other_weights, _, _ = problem(seed)
            out = module(other, other_ids, other_weights)
            out.backward(dout)
            results.append([out, other.grad, other_weights.grad, *(p.grad.clone() for p in module.parameters())])
            module.zero_grad()
        for replayed, launched in zip(*results, strict=True):
            assert launched.any()
            assert_same_bits(replayed, launched)


@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of what they do themselves
def test_compiles_whole(config: FP8Config) -> None:
    problem_, dout = problem(), output_gradient()
    torch.compiler.reset()
    compiled = torch.compile(layer_of(config), fullgraph=True)
    for actual, expected in zip(step(compiled, problem_, dout), step(layer_of(config), problem_, dout), strict=True):
        assert sqnr(actual, expected) >= 45


@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of what they do themselves
def test_compiles_whole_with_biases_and_main_grads(config: FP8Config) -> None:
    (hidden, ids, weights, w_gate_up, w_down), dout = problem(), output_gradient()
    biases = (torch.randn(E, 2 * I, device="cuda"), torch.randn(E, H, device="cuda"))

    def layer(hidden: Tensor, weights: Tensor, main_gate_up: Tensor, main_down: Tensor) -> Tensor:
        return fp8moe.moe_forward(
            hidden, ids, weights, w_gate_up, w_down,
            config=config, biases=biases, main_grads=(main_gate_up, main_down),
        )  # fmt: skip

    torch.compiler.reset()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        main_grads = [torch.zeros_like(w, dtype=torch.float32) for w in (w_gate_up, w_down)]
        out = function(hidden, weights, *main_grads)
        out.backward(dout)
        results.append([out, hidden.grad, weights.grad, *main_grads])
        hidden.grad = weights.grad = None
    for actual, expected in zip(*results, strict=True):
        assert sqnr(actual, expected) >= 45


def test_caches_and_main_grads_together(config: FP8Config) -> None:
    problem_, dout = problem(), output_gradient()
    hidden, ids, weights, w_gate_up, w_down = problem_
    expected = step(layer_of(config), problem_, dout)
    main_grads = (torch.zeros_like(w_gate_up, dtype=torch.float32), torch.zeros_like(w_down, dtype=torch.float32))
    caches = (WeightCache(w_gate_up), WeightCache(w_down))
    for _ in range(2):
        out = fp8moe.moe_forward(
            hidden, ids, weights, w_gate_up, w_down, config=config, main_grads=main_grads, weight_caches=caches
        )
        assert_same_bits(out, expected[0])
        out.backward(dout)
    assert w_gate_up.grad is None
    assert w_down.grad is None
    for main_grad, gradient in zip(main_grads, expected[3:], strict=True):
        assert sqnr(main_grad, 2 * gradient.float()) >= 45


def test_a_bad_token_spoils_no_other(config: FP8Config) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    clean = layer_of(config)(hidden, ids, weights, w_gate_up, w_down)
    bad = hidden.detach().clone()
    bad[17, 3] = torch.nan
    out = layer_of(config)(bad, ids.index_fill(0, torch.tensor([17], device="cuda"), 0), weights, w_gate_up, w_down)
    assert out[17].isnan().all()
    others = torch.arange(T, device="cuda") != 17
    assert sqnr(out[others], clean[others]) >= 45
