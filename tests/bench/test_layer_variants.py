"""Every way to compute the layer is right, and what is wrong is caught."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.bench import peers
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.layer.baseline import bf16_layer
from fp8moe.bench.layer.problem import LayerProblem
from fp8moe.bench.layer.shapes import TopkRouting
from fp8moe.bench.layer.task import LayerTask
from fp8moe.bench.layer.variants import COMPRESSED_LIMITS, LIGER_VARIANT, LIMITS, layer_variants
from fp8moe.bench.ops import check_variant, measure_variant, saved_by
from fp8moe.bench.problem import Products
from fp8moe.bench.variants import Variant
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.explain import explain
from fp8moe.gemm.select import Selected
from tests.bench.support import CPU, LAYER, small_lab, small_layer


@pytest.fixture(scope="module")
def problem() -> LayerProblem:
    return small_layer()


@pytest.fixture(scope="module")
def expected(problem: LayerProblem) -> Products:
    return problem.products(bf16_layer(CPU).op)


def variants() -> dict[str, Variant]:
    found = layer_variants(partial(explain, CPU))
    return {variant.name.removeprefix("fp8moe auto").strip(): variant for variant in found}


def test_every_variant_is_right(problem: LayerProblem, expected: Products) -> None:
    found = variants()
    assert list(found) == ["", "cached", "main_grads", "cached main_grads", "FP8 storage"]
    assert {name: variant.limits for name, variant in found.items()} == {
        **dict.fromkeys(found, LIMITS), "FP8 storage": COMPRESSED_LIMITS,
    }  # fmt: skip
    for variant in found.values():
        agreement, computed_by = check_variant(variant, problem, expected)
        assert computed_by == "emulated"
        assert list(agreement) == list(expected)
        assert all(21.5 < close.sqnr_db < 30 for close in agreement.values())


def test_where_it_is_bf16_there_is_one_variant(problem: LayerProblem, expected: Products) -> None:
    bf16 = replace(explain(CPU), selected=dict.fromkeys(Gemm, Selected(None, "")))
    (alone,) = layer_variants(lambda **_: bf16)
    assert (alone.name, alone.precision) == ("fp8moe auto", "bf16")


def test_liger_is_measured_where_it_is_installed(
    problem: LayerProblem, expected: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = LayerTask(problem.shape, TopkRouting.UNIFORM)
    monkeypatch.setattr(peers, "liger_is_installed", lambda: False)
    assert LIGER_VARIANT not in task.variants([partial(explain, CPU)])
    monkeypatch.setattr(peers, "liger_is_installed", lambda: True)
    variant, *ours = task.variants([partial(explain, CPU)])
    assert (variant, len(ours)) == (LIGER_VARIANT, 5)

    class Layer:
        """Liger's layer, as its gradient function is called: `apply` of int32 ids before the weights."""

        @staticmethod
        def apply(hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            assert ids.dtype == torch.int32
            out: Tensor = bf16_layer(CPU).op(hidden, ids.long(), weights, w_gate_up, w_down)
            return out

    module = ModuleType(peers._LIGER_MODULE)
    setattr(module, peers._LIGER_FUNCTION, Layer)
    monkeypatch.setitem(sys.modules, peers._LIGER_MODULE, module)
    agreement, computed_by = check_variant(variant, problem, expected)
    assert computed_by == "Triton"
    assert all(close.sqnr_db > 40 for close in agreement.values())


def test_gradients_go_to_main_grads(problem: LayerProblem) -> None:
    found = variants()
    plain = problem.products(found[""].op)
    for name in ("main_grads", "cached main_grads"):
        for main_grad in problem.main_grads.values():
            main_grad.zero_()
        for _ in range(2):
            products = problem.products(found[name].op)
        for weight, main_grad in problem.main_grads.items():
            assert products[weight] is main_grad
            torch.testing.assert_close(main_grad, 2 * plain[weight].float(), rtol=0.01, atol=0.02)


def test_cached_weights_are_quantized_once(problem: LayerProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    found = variants()
    plain, cached = problem.products(found[""].op), problem.products(found["cached"].op)

    def never(*args: object) -> None:
        raise AssertionError("it is cached")

    for name in ("quantize_weight_for_forward", "quantize_weight_for_dgrad"):
        monkeypatch.setattr(f"fp8moe.autograd.quantized_weight.{name}", never)
    monkeypatch.setattr("fp8moe.weight_cache.quantize_weight_into", never)
    again = problem.products(found["cached main_grads"].op)  # the caches are the same
    for name in plain:
        assert torch.equal(cached[name], plain[name])
    assert torch.equal(again["out"], plain["out"])


def test_what_is_saved(problem: LayerProblem) -> None:
    found = variants()
    weights = problem.w_gate_up.nbytes + problem.w_down.nbytes
    plain, compressed, cached = (saved_by(found[name], problem) for name in ("", "FP8 storage", "cached"))
    capacity = problem.sizes.gate_up.capacity
    m, features = LAYER.t * LAYER.k, 2 * LAYER.i
    # (M, 2I) in bf16, or padded in codes and one scale for 128 of them
    assert plain[0] - compressed[0] == m * features * 2 - (capacity * features + capacity * features // 128 * 4)
    assert plain[1] == compressed[1] == weights
    codes = problem.w_gate_up.numel() + problem.w_down.numel()
    assert cached == (plain[0], weights + codes + codes // 128**2 * 4)
    assert plain[0] < saved_by(bf16_layer(CPU), problem)[0]


def test_every_figure_of_a_layer(problem: LayerProblem, expected: Products) -> None:
    lab = small_lab()
    fp8 = measure_variant(variants()[""], problem, expected, lab)
    bf16 = measure_variant(bf16_layer(CPU), problem, expected, lab)
    for found in (fp8, bf16):
        assert found.both_floor_ms is not None
        assert found.forward_floor_ms is not None
        assert found.backward_floor_ms is not None
        assert found.both_floor_ms == pytest.approx(found.forward_floor_ms + found.backward_floor_ms)
        for timing in (found.forward, found.backward, found.both):
            assert timing.median_ms > 0
        # six products of 2 M 2I H or 2 M H I operations at 2e9 or 1e9 a second
        rate = 2e9 if found is fp8 else 1e9
        assert found.both_floor_ms > 3 * 2 * 768 * (256 * 256 + 256 * 128) / rate * 1e3
    assert bf16.both_floor_ms is not None
    assert fp8.both_floor_ms is not None
    assert fp8.both_floor_ms < bf16.both_floor_ms
    assert (fp8.graph, fp8.host_us, fp8.peak_bytes) == (None, None, None)


def wrong(name: str, problem: LayerProblem) -> Variant:
    """The baseline with one mistake."""
    right = bf16_layer(CPU)

    def op(*arguments: Tensor) -> Tensor:
        hidden, ids, weights, w_gate_up, w_down = arguments
        one_token = torch.arange(LAYER.t) == 7
        mistakes: dict[str, Any] = {
            "other experts": (hidden, (ids + 1) % LAYER.e, weights, w_gate_up, w_down),
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
def test_a_wrong_layer_is_not_timed(problem: LayerProblem, expected: Products, mistake: str, message: str) -> None:
    with pytest.raises(WrongResultError, match=message):
        measure_variant(wrong(mistake, problem), problem, expected, small_lab())


def test_a_layer_noisier_than_fp8_is_refused(problem: LayerProblem, expected: Products) -> None:
    right = bf16_layer(CPU)

    def noisy(hidden: Tensor, *rest: Tensor) -> Tensor:
        out = right.op(hidden, *rest)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return out + (0.08 * out.detach().float().std() * noise).to(out.dtype)  # 22 dB

    with pytest.raises(WrongResultError, match=r"out is wrong: SQNR 2[12]\.\d dB.* at least 23 and 10 dB"):
        check_variant(replace(right, op=noisy, limits=LIMITS), problem, expected)
