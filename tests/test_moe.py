"""`moe_forward`: against a loop over tokens, and against `swiglu_experts` on rows permuted by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import ActivationStorage, FP8Config, ScaleFormat, SwiGLUExperts, WeightCache
from fp8moe.autograd import experts
from fp8moe.config import TOKEN_TILES
from fp8moe.gemm.emulated import Emulated
from fp8moe.operands import TokenGroups
from tests.generators import offsets
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr
from tests.test_experts import gradients
from tests.test_grouped_mm import bf16_route, poisoned_memory

__all__ = ["bf16_route", "poisoned_memory"]  # fixtures

T, K, E, H, I = 90, 3, 5, 256, 128  # noqa: E741


def problem(dtype: torch.dtype = torch.bfloat16, hidden_size: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hidden`, ids (some skipped, one expert never chosen), weights, `w_gate_up`, `w_down`."""
    hidden = torch.randn(T, hidden_size).to(dtype).requires_grad_()
    ids = torch.randint(0, E - 1, (T, K))
    ids[::7, 1], ids[3, 0], ids[4] = -1, E, -1
    weights = torch.rand(T, K).add(0.1).requires_grad_()
    w_gate_up = (torch.randn(E, 2 * I, hidden_size) * hidden_size**-0.5).to(dtype).requires_grad_()
    w_down = (torch.randn(E, hidden_size, I) * I**-0.5).to(dtype).requires_grad_()
    return hidden, ids, weights, w_gate_up, w_down


def by_loop(hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """fp32, choice by choice."""
    outputs = []
    for token, (chosen, scales) in enumerate(zip(ids.tolist(), weights, strict=True)):
        out = torch.zeros(hidden.shape[1])
        for expert, scale in zip(chosen, scales, strict=True):
            if 0 <= expert < E:
                gate, up = (w_gate_up[expert].float() @ hidden[token].float()).chunk(2)
                out = out + w_down[expert].float() @ (F.silu(gate) * up * scale)
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", ActivationStorage)
@pytest.mark.parametrize(("token_tile", "hidden_size"), [*((tile, H) for tile in TOKEN_TILES), (256, 200), (128, 333)])
def test_close_to_high_precision(
    dtype: torch.dtype, storage: ActivationStorage, token_tile: int, hidden_size: int
) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem(dtype, hidden_size)
    ids = torch.where(ids == 2, 1, ids)  # so that one expert has more than 128 rows
    inputs = (hidden, weights, w_gate_up, w_down)
    config = FP8Config(activation_storage=storage, wgrad_token_tile=token_tile)
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, config=config)
    expected = by_loop(hidden, ids, weights, w_gate_up, w_down)
    assert out.dtype == dtype
    assert sqnr(out, expected) >= 23
    assert (out[4] == 0).all()
    floor = 22.5 if storage is ActivationStorage.BF16 else 21.5
    for x, mine, theirs in zip(inputs, gradients(out, *inputs), gradients(expected, *inputs), strict=True):
        assert (mine.dtype, mine.shape) == (x.dtype, x.shape)
        assert sqnr(mine, theirs) >= floor
    d_hidden, d_weights, d_gate_up, _ = gradients(fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down), *inputs)
    assert (d_hidden[4] == 0).all()
    assert (d_weights[(ids < 0) | (ids >= E)] == 0).all()
    assert (d_gate_up[E - 1] == 0).all()


def test_same_bits_as_the_experts_on_permuted_rows() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    flat = torch.where((ids < 0) | (ids >= E), E, ids).flatten()
    order = flat.argsort(stable=True)
    offs = offsets(torch.bincount(flat, minlength=E)[:E].tolist())
    rows = fp8moe.swiglu_experts(hidden[order // K], w_gate_up, w_down, offs, weights.flatten()[order])
    by_token = torch.zeros(T * K, H).index_copy(0, order, rows.float()).view(T, K, H)
    total = torch.zeros(T, H)
    for choice in by_token.unbind(1):
        total = total + choice
    expected = total.bfloat16()
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    assert_same_bits(out, expected)
    inputs = (hidden, weights, w_gate_up, w_down)
    # Of the same operands; only the order in which a token's gradients are rounded and added differs.
    for mine, theirs in zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True):
        assert sqnr(mine, theirs) >= 45


@pytest.mark.parametrize("frozen", [(), (0,), (2,), (3,), (0, 1), (1, 2), (0, 1, 3)], ids=str)
@pytest.mark.parametrize(("token_tile", "hidden_size"), [(128, 200), (256, H)])
def test_operands_made_apart_or_together_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, frozen: tuple[int, ...], token_tile: int, hidden_size: int
) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem(hidden_size=hidden_size)
    inputs = (hidden, weights, w_gate_up, w_down)
    for index in frozen:
        inputs[index].requires_grad_(False)
    results = []
    for apart in (True, False):
        monkeypatch.setattr(experts, "makes_operands_apart", lambda x, choices, apart=apart: apart)
        config = FP8Config(wgrad_token_tile=token_tile)
        with recording_saved_tensors() as saved:
            out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, config=config)
        assert any(x.data_ptr() == hidden.data_ptr() for x in saved) == (apart and 2 not in frozen)
        results.append([out.detach(), *gradients(out, *(x for x in inputs if x.requires_grad))])
    for mine, other in zip(*results, strict=True):
        assert mine.any()
        assert_same_bits(mine, other)


@pytest.mark.parametrize(("dtype", "k", "saves_tokens"), [
    (torch.bfloat16, 1, False), (torch.bfloat16, 2, True), (torch.float16, 8, True),
    (torch.float32, 2, False), (torch.float32, 4, True),
])  # fmt: skip
def test_saves_the_tokens_or_their_operand_whichever_is_smaller(dtype: torch.dtype, k: int, saves_tokens: bool) -> None:
    hidden, _, _, w_gate_up, w_down = problem(dtype)
    ids, weights = torch.randint(0, E, (T, k)), torch.rand(T, k, requires_grad=True)
    with recording_saved_tensors() as saved:
        out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    capacity = TokenGroups.capacity_for(T * k, E)
    assert any(x.data_ptr() == hidden.data_ptr() for x in saved) == saves_tokens
    assert ((H, capacity) in {tuple(x.shape) for x in saved}) != saves_tokens
    inputs = (hidden, weights, w_gate_up, w_down)
    expected = by_loop(hidden, ids, weights, w_gate_up, w_down)
    for mine, theirs in zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True):
        assert sqnr(mine, theirs) >= 22


def test_backward_makes_the_inputs_token_operand_just_before_its_wgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    done: list[str] = []

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        return noted

    monkeypatch.setattr(Emulated, "m_grouped", noting("dgrad", Emulated.m_grouped))
    monkeypatch.setattr(Emulated, "k_grouped", noting("wgrad", Emulated.k_grouped))
    for name in ("quantize_tokens", "quantize_and_spread_rows"):
        monkeypatch.setattr(experts, name, noting(name, getattr(experts, name)))
    out.sum().backward()
    assert done == ["dgrad", "wgrad", "dgrad", "quantize_tokens", "wgrad"]


def test_tokens_changed_in_place_before_backward_are_refused() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    tokens = hidden.clone()
    out = fp8moe.moe_forward(tokens, ids, weights, w_gate_up, w_down)
    with torch.no_grad():
        tokens.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_offloading_and_checkpointing_change_nothing() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    hidden = hidden.detach().t().contiguous().t().requires_grad_()  # a hook loses its strides
    inputs = (hidden, weights, w_gate_up, w_down)

    def layer(hidden: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        return fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)

    expected = layer(*inputs)

    def elsewhere(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, elsewhere):
        offloaded = layer(*inputs)
    found = gradients(expected, *inputs)
    for out in (offloaded, checkpoint(layer, *inputs, use_reentrant=False)):
        assert_same_bits(out, expected)
        for mine, other in zip(gradients(out, *inputs), found, strict=True):
            assert_same_bits(mine, other)


@pytest.mark.parametrize("ids", [torch.full((T, K), -1), torch.zeros(T, K, dtype=torch.int32)], ids=["none", "one"])
def test_all_or_nothing_on_one_expert(ids: Tensor) -> None:
    hidden, _, weights, w_gate_up, w_down = problem()
    inputs = (hidden, weights, w_gate_up, w_down)
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    expected = by_loop(hidden, ids, weights, w_gate_up, w_down)
    if (ids < 0).all():
        assert not out.any()
        assert not any(gradient.any() for gradient in gradients(out, *inputs))
    else:
        for mine, theirs in zip(
            [out, *gradients(out, *inputs)], [expected, *gradients(expected, *inputs)], strict=True
        ):
            assert sqnr(mine, theirs) >= 22.5


def test_no_tokens() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    out = fp8moe.moe_forward(hidden[:0], ids[:0], weights[:0], w_gate_up, w_down)
    assert out.shape == (0, H)
    d_gate_up, d_down = gradients(out, w_gate_up, w_down)
    assert not d_gate_up.any()
    assert not d_down.any()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_token_spoils_no_other(value: float) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    clean = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    bad = hidden.detach().clone()
    bad[20, 5] = value
    out = fp8moe.moe_forward(bad, ids, weights, w_gate_up, w_down)
    assert out[20].isnan().all()
    others = torch.arange(T) != 20
    assert_same_bits(out[others], clean[others])


@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
def test_bf16_route_keeps_the_promises() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    inputs = (hidden, weights, w_gate_up, w_down)
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    expected = by_loop(hidden, ids, weights, w_gate_up, w_down)
    for mine, theirs in zip([out, *gradients(out, *inputs)], [expected, *gradients(expected, *inputs)], strict=True):
        assert sqnr(mine, theirs) >= 38
    assert (out[4] == 0).all()
    w_gate, w_up = (half.contiguous() for half in w_gate_up.chunk(2, dim=1))
    assert sqnr(fp8moe.moe_forward(hidden, ids, weights, (w_gate, w_up), w_down), expected) >= 38


@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bf16_route_reads_no_row_of_a_dropped_choice(value: float, dtype: torch.dtype) -> None:
    """A token that no expert gets may hold anything; memory that nothing writes holds NaN here."""
    hidden, ids, weights, w_gate_up, w_down = problem(dtype)
    with torch.no_grad():
        hidden[4] = value
    inputs = (hidden, weights, w_gate_up, w_down)
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    found = gradients(out, *inputs)
    with torch.no_grad():
        hidden[4] = 0
    expected = by_loop(hidden, ids, weights, w_gate_up, w_down)
    for mine, theirs in zip([out, *found], [expected, *gradients(expected, *inputs)], strict=True):
        assert sqnr(mine, theirs) >= 38
    for x, gradient in zip(inputs, found, strict=True):
        assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
    assert (out[4] == 0).all()
    assert (found[0][4] == 0).all()
    assert (found[1][(ids < 0) | (ids >= E)] == 0).all()
    assert (found[2][E - 1] == 0).all()


@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
def test_bf16_route_without_tokens_or_choices() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    for tokens, chosen in ((0, ids), (T, torch.full_like(ids, -1))):
        out = fp8moe.moe_forward(hidden[:tokens], chosen[:tokens], weights[:tokens], w_gate_up, w_down)
        assert out.shape == (tokens, H)
        assert not out.any()
        assert not any(gradient.any() for gradient in gradients(out, hidden, weights, w_gate_up, w_down))


@pytest.mark.usefixtures("bf16_route")
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("pair", [False, True])
def test_bf16_route_compiles_whole_for_every_number_of_tokens(pair: bool) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    inputs = (hidden, weights, w_gate_up, w_down)

    def layer(hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        first = (w_gate_up[:, :I], w_gate_up[:, I:]) if pair else w_gate_up
        return fp8moe.moe_forward(hidden, ids, weights, first, w_down)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    stance = "default"
    for tokens in (50, 3, T - 1):
        given = hidden[:tokens], ids[:tokens], weights[:tokens], w_gate_up, w_down
        with torch.compiler.set_stance(stance):
            actual = compiled(*given)
        expected = layer(*given)
        assert_same_bits(actual.detach(), expected.detach())
        for mine, theirs in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
            assert_same_bits(mine, theirs)
        stance = "fail_on_recompile"


@pytest.mark.usefixtures("bf16_route")
def test_bf16_route_can_be_differentiated_once() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down)
    for x in (hidden, weights):
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("route", ["fp8", "bf16"])
def test_large_activations_of_fp16_do_not_overflow(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, up and the activation are never held in fp16, whose largest number is 65504."""
    if route == "bf16":
        monkeypatch.setattr("fp8moe.autograd.experts.backends_for", lambda *args, **kwargs: None)
    hidden, ids, weights, w_gate_up, w_down = (x.detach() for x in problem(torch.float32))
    inputs = [x.half().requires_grad_() for x in (hidden * 150, w_gate_up, w_down * 1e-2)]
    weights.requires_grad_()
    out = fp8moe.moe_forward(inputs[0], ids, weights, inputs[1], inputs[2])
    expected = by_loop(inputs[0].double(), ids, weights.double(), inputs[1].double(), inputs[2].double())
    gate, up = torch.einsum("th,eih->tei", inputs[0].double(), inputs[1].double()).chunk(2, dim=2)
    assert (torch.nn.functional.silu(gate) * up).abs().max() > 65504
    assert out.dtype == torch.float16
    assert sqnr(out, expected) >= (23 if route == "fp8" else 40)
    before_it = (*inputs[:2], weights)  # the gradient of w_down is itself larger than fp16 can hold
    for mine, theirs in zip(gradients(out, *before_it), gradients(expected, *before_it), strict=True):
        assert sqnr(mine, theirs) >= (15 if route == "fp8" else 35)


@pytest.mark.parametrize("route", ["fp8", "bf16"])
def test_router_weights_are_used_as_they_are(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that BF16 would round by 0.4% scale the output by themselves; float64 is taken as fp32."""
    if route == "bf16":
        monkeypatch.setattr("fp8moe.autograd.experts.backends_for", lambda *args, **kwargs: None)
    hidden, ids, _, w_gate_up, w_down = (x.detach() for x in problem())
    config = FP8Config(scale_format=ScaleFormat.POW2)
    ones = fp8moe.moe_forward(hidden, ids, torch.ones(T, K), w_gate_up, w_down, config=config).float()
    weight = 1 + 2.0**-8 * 0.99  # to BF16 it is 1
    scaled = fp8moe.moe_forward(hidden, ids, torch.full((T, K), weight), w_gate_up, w_down, config=config).float()
    assert (scaled.norm() / ones.norm() - weight).abs() < 2e-3
    in_double = torch.full((T, K), weight, dtype=torch.float64, requires_grad=True)
    out = fp8moe.moe_forward(hidden, ids, in_double, w_gate_up, w_down, config=config)
    assert_same_bits(out.detach().float(), scaled)
    out.sum().backward()
    assert in_double.grad is not None
    assert in_double.grad.dtype == torch.float64
    assert in_double.grad.any()


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what it does itself
@pytest.mark.parametrize("module", [False, True])
def test_exports_for_any_number_of_tokens_and_choices(module: bool) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_gate_up, self.w_down = (torch.nn.Parameter(x.detach()) for x in problem()[3:])

        def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return fp8moe.moe_forward(hidden, ids, weights, self.w_gate_up, self.w_down)

    layer = SwiGLUExperts(E, H, 128) if module else Layer()
    hidden, ids, weights, *_ = (x.detach() for x in problem(torch.float32 if module else torch.bfloat16))
    rows = {0: Dim("T"), 1: Dim("k")}
    exported = torch.export.export(
        layer, (hidden, ids, weights), dynamic_shapes=({0: rows[0]}, rows, rows), strict=False
    ).module()
    for tokens, choices in ((T, K), (3, 1), (200, 5)):
        others = torch.randn(tokens, H).to(hidden.dtype), torch.randint(-1, E, (tokens, choices))
        router = torch.rand(tokens, choices)
        assert_same_bits(exported(*others, router), layer(*others, router).detach())


def test_accumulation_with_caches_and_main_grads_equals_plain_steps() -> None:
    hidden, ids, weights, w_gate_up, w_down = problem(torch.float32)
    dout = torch.randn(T, H)
    main_grads = (torch.zeros_like(w_gate_up), torch.zeros_like(w_down))
    caches = (WeightCache(w_gate_up), WeightCache(w_down))
    for part in (slice(0, 40), slice(40, T)):
        plain = fp8moe.moe_forward(hidden[part], ids[part], weights[part], w_gate_up, w_down)
        plain.backward(dout[part])
        other = fp8moe.moe_forward(
            hidden[part], ids[part], weights[part], w_gate_up, w_down, main_grads=main_grads, weight_caches=caches
        )
        assert_same_bits(other, plain)
        other.backward(dout[part])
    for w, main_grad in zip((w_gate_up, w_down), main_grads, strict=True):
        assert_same_bits(w.grad, main_grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("token_tile", [128, 256])
def test_compiled_code_computes_the_same_bits(token_tile: int) -> None:
    hidden, ids, weights, w_gate_up, w_down = problem()
    inputs = (hidden, weights, w_gate_up, w_down)

    def layer(hidden: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        config = FP8Config(wgrad_token_tile=token_tile)
        return fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, config=config)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(*inputs)
    assert_same_bits(compiled(*inputs), expected)
    for mine, theirs in zip(gradients(compiled(*inputs), *inputs), gradients(expected, *inputs), strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"hidden": None}, TypeError, "hidden is a NoneType"),
        ({"topk_ids": torch.zeros(T, K)}, TypeError, "topk_ids has dtype torch.float32"),
        ({"topk_ids": torch.zeros(T, 0, dtype=torch.int64)}, ValueError, "at least one choice"),
        ({"topk_ids": torch.zeros(T + 1, K, dtype=torch.int64)}, ValueError, r"topk_ids has shape \(91, 3\)"),
        ({"topk_weights": torch.zeros(T, 2)}, ValueError, r"topk_weights has shape \(90, 2\)"),
        ({"topk_weights": torch.zeros(T, K, dtype=torch.int64)}, TypeError, "topk_weights has dtype torch.int64"),
        ({"topk_weights": torch.zeros(T, K, device="meta")}, ValueError, "topk_weights is on meta"),
        ({"w_down": torch.zeros(E, H, 100)}, ValueError, "w_gate_up has shape"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], told: str) -> None:
    names = ("hidden", "topk_ids", "topk_weights", "w_gate_up", "w_down")
    arguments: dict[str, object] = dict(zip(names, problem(), strict=True))
    with pytest.raises(error, match=told):
        fp8moe.moe_forward(**{**arguments, **change})  # type: ignore[arg-type]
