"""Every way to compute the layer is right, and what is wrong is caught."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.bench import peers
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.layer.baseline import fused_layer
from fp8moe.bench.layer.experts import PLAIN
from fp8moe.bench.layer.task import LAYER, MIN_SQNR_DB
from fp8moe.bench.measure import check_variant
from fp8moe.bench.peers import liger_variant
from fp8moe.bench.problem import Problem, Products
from fp8moe.bench.variants import Variant, fp8moe_variants
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.explain import explain
from fp8moe.gemm.select import Selected
from fp8moe.operands import TokenGroups
from tests.bench.support import CPU, GPT_OSS_SHAPE, LAYER_SHAPE, auto_variants, small_layer


def eager() -> Variant:
    return LAYER.baselines(LAYER_SHAPE, CPU)[0]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_layer()


@pytest.fixture(scope="module")
def expected(problem: Problem) -> Products:
    return problem.products(fused_layer(PLAIN))


def test_every_variant_is_right_and_saves_what_it_should(problem: Problem, expected: Products) -> None:
    found = auto_variants(LAYER, LAYER_SHAPE)
    assert list(found) == ["", "cached", "main_grad", "cached main_grad", "weights kept", "FP8 storage"]
    assert [variant.min_sqnr_db for variant in found.values()] == [*[22.5] * 5, 21.5]
    checked = {name: check_variant(variant, problem, expected) for name, variant in found.items()}
    for one in checked.values():
        assert one.computed_by == "emulated"
        assert list(one.sqnr_db) == ["out", "d_hidden", "d_topk_weights", "d_w_gate_up", "d_w_down"]
        assert all(21.5 < decibels < 30 for decibels in one.sqnr_db.values())

    plain, compressed, cached = checked[""], checked["FP8 storage"], checked["cached"]
    t, k, _, i, e = LAYER_SHAPE.sizes
    capacity = TokenGroups.capacity_for(t * k, e)
    # (M, 2I) in bf16, or padded in codes and one scale for 128 of them
    stored = t * k * 2 * i * 2 - (capacity * 2 * i + capacity * 2 * i // 128 * 4)
    assert plain.saved_row_bytes - compressed.saved_row_bytes == stored
    assert cached.saved_row_bytes == plain.saved_row_bytes + 2 * 16  # the handles of the caches
    assert plain.saved_row_bytes < check_variant(eager(), problem, expected).saved_row_bytes


def test_experts_like_gpt_osss_are_right_in_every_way() -> None:
    problem = small_layer(GPT_OSS_SHAPE)
    expected = problem.products(LAYER.reference(GPT_OSS_SHAPE))
    gradients = ["d_hidden", "d_topk_weights", "d_w_gate_up", "d_w_down", "d_b_gate_up", "d_b_down"]
    assert list(expected) == ["out", *gradients]
    assert expected["d_w_gate_up"].transpose(1, 2).is_contiguous()  # as the weight is stored
    eager, *others = LAYER.baselines(GPT_OSS_SHAPE, CPU)
    assert others == []  # no main_grad of that layout
    assert min(check_variant(eager, problem, expected).sqnr_db.values()) > 30
    found = auto_variants(LAYER, GPT_OSS_SHAPE)
    assert list(found) == ["", "cached", "weights kept", "FP8 storage"]
    for variant in found.values():
        assert min(check_variant(variant, problem, expected).sqnr_db.values()) > 20
    assert LAYER.peer(GPT_OSS_SHAPE, problem.group_sizes) is None


def test_where_it_is_bf16_there_is_one_variant() -> None:
    bf16 = replace(explain(CPU), selected=dict.fromkeys(Gemm, Selected(None, "")))
    (alone,) = fp8moe_variants(LAYER.run(LAYER_SHAPE), LAYER.options(LAYER_SHAPE), lambda **_: bf16)
    assert (alone.name, alone.computed_by(torch.zeros(1))) == ("fp8moe auto", "BF16")


def test_ligers_layer_is_called_as_it_should(
    problem: Problem, expected: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Layer:
        """Liger's layer, as its gradient function is called: `apply` of int32 ids before the weights."""

        @staticmethod
        def apply(hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            assert ids.dtype == torch.int32
            out: Tensor = fused_layer(PLAIN)(hidden, ids.long(), weights, w_gate_up, w_down)
            return out

    module = ModuleType(peers._LIGER_MODULE)
    module.LigerFusedMoEFunction = Layer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, peers._LIGER_MODULE, module)
    checked = check_variant(liger_variant(problem.group_sizes), problem, expected)
    assert checked.computed_by == "Triton"
    assert min(checked.sqnr_db.values()) > 40


def test_gradients_go_to_main_grads(problem: Problem) -> None:
    found = auto_variants(LAYER, LAYER_SHAPE)
    plain = problem.products(found[""].op)
    for name in ("main_grad", "cached main_grad"):
        for main_grad in problem.main_grads.values():
            main_grad.zero_()
        for _ in range(2):
            products = problem.products(found[name].op)
        for weight, main_grad in problem.main_grads.items():
            assert products[weight] is main_grad
            torch.testing.assert_close(main_grad, 2 * plain[weight].float(), rtol=0.01, atol=0.02)


def test_cached_weights_are_quantized_once(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    found = auto_variants(LAYER, LAYER_SHAPE)
    plain, cached = problem.products(found[""].op), problem.products(found["cached"].op)

    def never(*args: object) -> None:
        raise AssertionError("it is cached")

    monkeypatch.setattr("fp8moe.quantize.reference.quantize_weight", never)
    again = problem.products(found["cached"].op)
    for name in plain:
        assert torch.equal(cached[name], plain[name])
        assert torch.equal(again[name], plain[name])


def wrong(name: str) -> Variant:
    """The baseline with one mistake."""
    right = eager()

    def op(*arguments: Tensor) -> Tensor:
        hidden, ids, weights, w_gate_up, w_down = arguments
        one_token = torch.arange(LAYER_SHAPE["T"]) == 7
        mistakes: dict[str, Any] = {
            "other experts": (hidden, (ids + 1) % LAYER_SHAPE["E"], weights, w_gate_up, w_down),
            "no gradient through the router": (hidden, ids, weights.detach() + 0 * weights, w_gate_up, w_down),
            "one token dropped": (hidden * ~one_token[:, None], ids, weights, w_gate_up, w_down),
            "half the gradient of down": (hidden, ids, weights, w_gate_up, 0.5 * w_down + 0.5 * w_down.detach()),
            "a lost expert": (hidden, ids, weights, _without_gradient(w_gate_up, 1), w_down),
        }
        return right.op(*mistakes[name])

    return replace(right, op=op)


def _without_gradient(w: Tensor, expert: int) -> Tensor:
    frozen = (torch.arange(w.shape[0]) == expert)[:, None, None]
    return torch.where(frozen, w.detach(), w)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("other experts", r"out is wrong: SQNR -"),
        ("no gradient through the router", r"d_topk_weights is wrong: SQNR 0\.0 dB"),
        ("one token dropped", r"out is wrong: SQNR .* worst row 0\.0 dB"),
        ("half the gradient of down", r"d_w_down is wrong: SQNR 6\.0 dB"),
        ("a lost expert", r"d_w_gate_up is wrong: SQNR .* worst row 0\.0 dB"),
    ],
)
def test_a_wrong_layer_is_not_timed(problem: Problem, expected: Products, mistake: str, message: str) -> None:
    with pytest.raises(WrongResultError, match=message):
        check_variant(wrong(mistake), problem, expected)


def test_a_layer_noisier_than_fp8_is_refused(problem: Problem, expected: Products) -> None:
    right = eager()

    def noisy(hidden: Tensor, *rest: Tensor) -> Tensor:
        out = right.op(hidden, *rest)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return out + (0.081 * out.detach().float().std() * noise).to(out.dtype)  # 22 dB

    with pytest.raises(WrongResultError, match=r"out is wrong: SQNR 2[12]\.\d dB.* at least 22.5 and 10 dB"):
        check_variant(replace(right, op=noisy, min_sqnr_db=MIN_SQNR_DB), problem, expected)
