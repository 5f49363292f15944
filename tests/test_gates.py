"""Experts with other gates, with biases, interleaved and transposed weights, and any sizes: against a plain layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import ActivationStorage, FP8Config, Gate, KernelPreference, ScaleFormat, WeightCache
from fp8moe.autograd.experts_in_bf16 import experts_in_bf16
from fp8moe.autograd.mlp_weights import MlpWeights, add_down_bias, expert_weights_of_tokens
from fp8moe.gate import GatedActivation
from fp8moe.gemm.select import BACKENDS
from fp8moe.rows.routing import route_choices
from tests.generators import offsets
from tests.measures import assert_same_bits, sqnr

T, K, E = 60, 2, 4
NAMES = ("hidden", "topk_weights", "w_gate_up", "w_down", "b_gate_up", "b_down")

Formula = Callable[[Tensor, Tensor], Tensor]


def gpt_oss(g: Tensor, u: Tensor) -> Tensor:
    g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
    return g * torch.sigmoid(1.702 * g) * (u + 1)


def clamped(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0)


def step3(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g).clamp(max=2.5) * u.clamp(-2.5, 2.5)


def gemma(g: Tensor, u: Tensor) -> Tensor:
    return F.gelu(g, approximate="tanh") * u


def nemotron(_: Tensor, u: Tensor) -> Tensor:
    return F.relu(u).square()


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


@dataclass(frozen=True)
class Case:
    """One kind of experts."""

    name: str
    gate: Gate
    formula: Formula
    hidden: int = 256
    intermediate: int = 128
    biases: bool = False
    interleaved: bool = False
    transposed: bool = False


GPT_OSS = Gate.clamped_swiglu(7.0, alpha=1.702, up_offset=1.0)
CASES = [
    Case("gpt-oss", GPT_OSS, gpt_oss, 200, 136, biases=True, interleaved=True, transposed=True),
    Case("gpt-oss, aligned", GPT_OSS, gpt_oss, biases=True, interleaved=True, transposed=True),
    Case("deepseek-v4", Gate.clamped_swiglu(2.0), clamped),
    Case("step 3", Gate.post_clamped_swiglu(2.5), step3, biases=True),
    Case("gemma", Gate.geglu_tanh(), gemma, 128, 72),
    Case("nemotron", Gate.relu_squared(), nemotron, biases=True),
    Case("nemotron, odd", Gate.relu_squared(), nemotron, 129, 77, biases=True, transposed=True),
    Case("swiglu, odd", Gate.swiglu(), swiglu, 127, 131),
    Case("swiglu, one feature", Gate.swiglu(), swiglu, 128, 1),
    Case("swiglu, transposed", Gate.swiglu(), swiglu, transposed=True),
    Case("swiglu with biases", Gate.swiglu(), swiglu, 130, 128, biases=True),
]  # fmt: skip


def ids(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def tensors(case: Case, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """All inputs that may get a gradient; weights as they are stored."""
    h, i, width = case.hidden, case.intermediate, case.gate.projections * case.intermediate
    made = {
        "hidden": torch.randn(T, h),
        "topk_weights": torch.rand(T, K) + 0.1,
        "w_gate_up": torch.randn(E, width, h) * h**-0.5,
        "w_down": torch.randn(E, h, i) * i**-0.5,
    }
    if case.transposed:
        made |= {name: made[name].transpose(1, 2).contiguous() for name in ("w_gate_up", "w_down")}
    if case.biases:
        made |= {"b_gate_up": torch.randn(E, width) * 0.5, "b_down": torch.randn(E, h) * 0.5}
    return {name: (x if name == "topk_weights" else x.to(dtype)).requires_grad_() for name, x in made.items()}


def arguments(case: Case, x: dict[str, Tensor]) -> dict[str, Any]:
    """What `moe_forward` takes of them, but for the ids."""
    w_gate_up, w_down = (x[name].transpose(1, 2) if case.transposed else x[name] for name in ("w_gate_up", "w_down"))
    return {
        "hidden": x["hidden"], "topk_weights": x["topk_weights"], "w_gate_up": w_gate_up, "w_down": w_down,
        "gate": case.gate, "biases": (x.get("b_gate_up"), x.get("b_down")), "interleaved": case.interleaved,
    }  # fmt: skip


def topk_ids(dropping: bool = False) -> Tensor:
    """The last expert gets nothing; some choices are dropped."""
    chosen = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    return chosen.masked_fill(torch.rand(T, K) < 0.1, -1) if dropping else chosen


def plain(case: Case, x: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """The layer as one would write it, in fp64."""
    y = {name: value.double() for name, value in x.items()}
    if case.transposed:
        y |= {name: y[name].transpose(1, 2) for name in ("w_gate_up", "w_down")}
    out = torch.zeros_like(y["hidden"])
    for expert in range(E):
        both = y["hidden"] @ y["w_gate_up"][expert].t()
        if case.biases:
            both = both + y["b_gate_up"][expert]
        if not case.gate.has_gate:
            act = case.formula(both, both)
        elif case.interleaved:
            act = case.formula(both[:, 0::2], both[:, 1::2])
        else:
            act = case.formula(*both.chunk(2, 1))
        result = act @ y["w_down"][expert].t()
        if case.biases:
            result = result + y["b_down"][expert]
        out = out + result * (y["topk_weights"] * (chosen == expert)).sum(1, keepdim=True)
    return out


def products(call: Callable[[], Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and all gradients."""
    out = call()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return {"out": out.detach(), **dict(zip(x, torch.autograd.grad(out, list(x.values()), dout), strict=True))}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], x: dict[str, Tensor], least: float) -> None:
    """`least` in dB. Where rounding moves a value across a clamp, its gradient comes or goes: hence the low limits."""
    for name, value in actual.items():
        assert expected[name].count_nonzero() > 0, name
        assert sqnr(value, expected[name]) >= least, (name, sqnr(value, expected[name]))
        if name != "out":
            assert (value.dtype, value.shape) == (x[name].dtype, x[name].shape)
    if "w_down" in actual:
        assert actual["w_down"][E - 1].count_nonzero() == 0


@ids(CASES)
@pytest.mark.parametrize("dropping", [False, True])
def test_close_to_the_plain_layer(case: Case, dropping: bool) -> None:
    x, chosen = tensors(case), topk_ids(dropping)
    expected = products(lambda: plain(case, x, chosen), x)
    actual = products(lambda: fp8moe.moe_forward(topk_ids=chosen, **arguments(case, x)), x)
    check(actual, expected, x, 19.0)


@ids(CASES)
def test_the_bf16_route_computes_the_same(case: Case) -> None:
    x, chosen = tensors(case), topk_ids(dropping=True)
    given = arguments(case, x)
    act = GatedActivation(case.intermediate, case.gate, given["biases"][0], case.interleaved)
    mlp = MlpWeights(given["w_gate_up"], given["w_down"], act, (None, None), (None, None))

    def layer() -> Tensor:
        ends, choice_row = route_choices(chosen, E)
        out = experts_in_bf16(x["hidden"], mlp, ends, x["topk_weights"], choice_row, zero_unused=False)
        if given["biases"][1] is None:
            return out
        return add_down_bias(out, expert_weights_of_tokens(chosen, x["topk_weights"], E), given["biases"][1])

    check(products(layer, x), products(lambda: plain(case, x, chosen), x), x, 28.0)


@ids([case for case in CASES if case.name in ("gpt-oss", "nemotron", "swiglu, odd")])
@pytest.mark.parametrize(
    "config",
    [
        FP8Config(scale_format=ScaleFormat.POW2),
        FP8Config(activation_storage=ActivationStorage.FP8),
        FP8Config(wgrad_token_tile=256),
        FP8Config(keep_quantized_weights=True),
    ],
    ids=["powers of two", "FP8 storage", "long tiles", "weights kept"],
)
def test_with_other_options(case: Case, config: FP8Config) -> None:
    x, chosen = tensors(case), topk_ids()
    expected = products(lambda: plain(case, x, chosen), x)
    call = partial(fp8moe.moe_forward, topk_ids=chosen, config=config, **arguments(case, x))
    check(products(call, x), expected, x, 18.0)


@ids(CASES)
def test_rows_that_are_grouped_already(case: Case) -> None:
    """`swiglu_experts` of the rows that `moe_forward` makes; rows of no group are zeros."""
    x = tensors(case)
    given, chosen = arguments(case, x), topk_ids(dropping=True)
    flat = chosen.flatten()
    order = torch.where(flat < 0, E, flat).argsort(stable=True)
    offs = offsets([int((flat == expert).sum()) for expert in range(E)])
    hidden, weights = given.pop("hidden"), given.pop("topk_weights")
    rows = fp8moe.swiglu_experts(hidden[order // K], offs=offs, row_weights=weights.flatten()[order], **given)
    assert rows[offs[-1] :].count_nonzero() == 0
    summed = torch.zeros(T, case.hidden).index_add(0, order // K, rows.float())
    assert sqnr(summed, plain(case, x, chosen)) >= 20.0


@ids([case for case in CASES if case.name in ("gpt-oss", "nemotron", "gemma")])
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_compiled_and_checkpointed_it_has_the_same_bits(case: Case) -> None:
    x, chosen = tensors(case), topk_ids()

    def layer(*values: Tensor) -> Tensor:
        return fp8moe.moe_forward(topk_ids=chosen, **arguments(case, dict(zip(x, values, strict=True))))

    expected = products(lambda: layer(*x.values()), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in (partial(compiled, *x.values()), partial(checkpoint, layer, *x.values(), use_reentrant=False)):
        for name, value in products(call, x).items():
            assert_same_bits(value, expected[name])


@ids([case for case in CASES if case.name in ("gpt-oss", "swiglu, odd")])
def test_a_cache_changes_no_bit(case: Case) -> None:
    x, chosen = tensors(case), topk_ids()
    given = arguments(case, x)
    caches = WeightCache(given["w_gate_up"]), WeightCache(given["w_down"])
    expected = products(lambda: fp8moe.moe_forward(topk_ids=chosen, **given), x)
    for _ in range(2):
        actual = products(lambda: fp8moe.moe_forward(topk_ids=chosen, weight_caches=caches, **given), x)
        for name, value in actual.items():
            assert_same_bits(value, expected[name])


def test_the_gradient_of_a_transposed_weight_is_not_laid_out_again() -> None:
    case = next(case for case in CASES if case.name == "gpt-oss, aligned")
    x = tensors(case)
    found = products(lambda: fp8moe.moe_forward(topk_ids=topk_ids(), **arguments(case, x)), x)
    assert found["w_gate_up"].is_contiguous()
    assert found["w_down"].is_contiguous()


def test_main_grads_take_gradients_in_the_order_of_the_weight() -> None:
    case = Case("interleaved", Gate.swiglu(), swiglu, interleaved=True)
    x, chosen = tensors(case), topk_ids()
    given = arguments(case, x)
    expected = products(lambda: fp8moe.moe_forward(topk_ids=chosen, **given), x)
    w_gate_up, w_down = (torch.zeros_like(x[name], dtype=torch.float32) for name in ("w_gate_up", "w_down"))
    main_grads = w_gate_up, w_down
    out = fp8moe.moe_forward(topk_ids=chosen, main_grads=main_grads, **given)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    for main_grad, name in zip(main_grads, ("w_gate_up", "w_down"), strict=True):
        assert sqnr(main_grad, expected[name]) >= 40.0


def test_frozen_experts_pay_no_wgrad_and_biases_alone_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    x, chosen = tensors(case), topk_ids()
    expected = products(lambda: fp8moe.moe_forward(topk_ids=chosen, **arguments(case, x)), x)
    for name in ("w_gate_up", "w_down", "hidden", "topk_weights"):
        x[name].requires_grad_(False)

    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("nothing wants the gradient of a weight")

    monkeypatch.setattr(BACKENDS[KernelPreference.EMULATED], "k_grouped", never, raising=False)
    trained = {name: x[name] for name in ("b_gate_up", "b_down")}
    found = products(lambda: fp8moe.moe_forward(topk_ids=chosen, **arguments(case, x)), trained)
    for name in trained:
        assert_same_bits(found[name], expected[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": "swiglu"}, TypeError, "gate is 'swiglu'; it must be a fp8moe.Gate"),
        ({"gate": Gate.relu_squared()}, ValueError, "w_gate_up has shape"),
        ({"gate": Gate.relu_squared(), "interleaved": True}, ValueError, "interleaved is True"),
        ({"interleaved": 1}, TypeError, "interleaved is 1"),
        ({"biases": None}, TypeError, "biases is None; it must be a pair"),
        ({"biases": (torch.zeros(E, 3), None)}, ValueError, r"biases\[0\] has shape \(4, 3\).*must be \(4, 256\)"),
        ({"biases": (None, torch.zeros(E, 3))}, ValueError, r"biases\[1\] has shape \(4, 3\).*must be \(4, 256\)"),
        ({"biases": (torch.zeros(E, 256, dtype=torch.int32), None)}, TypeError, r"biases\[0\] has dtype"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case("plain", Gate.swiglu(), swiglu)
    given = arguments(case, tensors(case)) | change
    with pytest.raises(error, match=message):
        fp8moe.moe_forward(topk_ids=topk_ids(), **given)


def test_a_pair_has_a_gate_and_is_not_interleaved() -> None:
    case = Case("plain", Gate.swiglu(), swiglu)
    given = arguments(case, tensors(case))
    pair = tuple(given.pop("w_gate_up").chunk(2, 1))
    with pytest.raises(ValueError, match="interleaved is True, and w_gate_up is a pair"):
        fp8moe.moe_forward(topk_ids=topk_ids(), w_gate_up=pair, **(given | {"interleaved": True}))
    with pytest.raises(ValueError, match=r"w_gate_up is a pair, and .* has no gate"):
        fp8moe.moe_forward(topk_ids=topk_ids(), w_gate_up=pair, **(given | {"gate": Gate.relu_squared()}))
