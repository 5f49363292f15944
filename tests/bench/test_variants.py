"""Who is measured, and under which name."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe import FP8Config, KernelPreference, WeightCache
from fp8moe.bench import peers
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.measure import check_variant, in_use
from fp8moe.bench.peers import torchao_variant
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.variants import (
    Variant,
    backends_to_measure,
    bf16_op,
    bf16_variants,
    describe_backends,
    fp8moe_variants,
    preferences_to_measure,
)
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.explain import Explanation, explain
from fp8moe.gemm.select import Selected
from tests.bench.support import CPU, SHAPE, auto_variants, small_problem

AUTO, DEEPGEMM, TRITON, EMULATED = (
    KernelPreference.AUTO,
    KernelPreference.DEEPGEMM,
    KernelPreference.TRITON,
    KernelPreference.EMULATED,
)


def test_on_a_cpu_auto_is_the_emulation_and_measured_once() -> None:
    assert preferences_to_measure(CPU, None) == [AUTO]
    variant = auto_variants(PRODUCT, SHAPE)[""]
    assert (variant.name, variant.is_ours) == ("fp8moe auto", True)
    assert variant.computed_by(torch.zeros(1)) == "emulated"


def test_what_is_asked_for_is_measured() -> None:
    assert preferences_to_measure(CPU, [EMULATED, AUTO]) == [EMULATED, AUTO]
    assert backends_to_measure(CPU, [AUTO]) == {EMULATED}


def test_on_a_gpu_what_can_be_used_is_measured_but_for_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def usable(device: torch.device, config: FP8Config) -> Explanation:
        found = explain(CPU)
        return replace(found, selected={}) if config.kernel_preference is DEEPGEMM else found

    monkeypatch.setattr("fp8moe.bench.variants.explain", usable)
    assert preferences_to_measure(torch.device("cuda", 0), None) == [AUTO, TRITON]


def test_a_preference_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"--backend deepgemm cannot be used on cpu: .*NVIDIA GPU"):
        preferences_to_measure(CPU, [DEEPGEMM])


def test_mixed_backends_and_bf16_are_named() -> None:
    explanation = explain(CPU)
    mixed = replace(
        explanation,
        selected={
            Gemm.FORWARD: Selected(DEEPGEMM, ""),
            Gemm.DGRAD: Selected(DEEPGEMM, ""),
            Gemm.WGRAD: Selected(TRITON, ""),
        },
    )
    assert describe_backends(mixed) == "forward deepgemm, dgrad deepgemm, wgrad triton"
    bf16 = replace(explanation, selected=dict.fromkeys(Gemm, Selected(None, "")))
    (alone,) = fp8moe_variants(PRODUCT.run(SHAPE), PRODUCT.options(SHAPE), lambda **_: bf16)
    assert (alone.name, alone.computed_by(torch.zeros(1))) == ("fp8moe auto", "BF16")


@pytest.mark.parametrize(("tile", "title"), [(None, ""), (128, " tiles of 128"), (256, " tiles of 256")])
def test_options_are_named_after_the_token_tile(tile: int | None, title: str) -> None:
    config = FP8Config(kernel_preference=EMULATED, wgrad_token_tile=tile)
    found = fp8moe_variants(PRODUCT.run(SHAPE), PRODUCT.options(SHAPE), partial(explain, CPU, config))
    assert [variant.name for variant in found] == [
        f"fp8moe emulated{title}{option}" for option in ("", " weights kept", " main_grad", " cached")
    ]


def test_fp8_is_also_measured_with_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept, into_main_grad, cached = auto_variants(PRODUCT, SHAPE).values()
    problem = small_problem()
    expected = problem.products(plain.op)
    (main_grad,) = problem.main_grads.values()
    assert not torch.equal(main_grad, expected["d_w"])
    for _ in range(2):
        assert problem.products(into_main_grad.op)["d_w"] is main_grad
    torch.testing.assert_close(main_grad, 2 * expected["d_w"].float(), rtol=0.01, atol=0.01)
    for variant in (kept, cached):
        assert torch.equal(problem.products(variant.op)["d_w"], expected["d_w"])

    def never(*args: object) -> None:
        raise AssertionError("it is cached")

    monkeypatch.setattr("fp8moe.quantize.reference.quantize_weight", never)
    assert torch.equal(problem.products(cached.op)["out"], expected["out"])


def test_a_lost_weight_gradient_does_not_pass_for_main_grad() -> None:
    problem = small_problem()
    expected = problem.products(bf16_op)
    check_variant(auto_variants(PRODUCT, SHAPE)["main_grad"], problem, expected)
    lost = Variant("lost", lambda a, w, offs: bf16_op(a, w.detach(), offs), lambda out: "", is_ours=True)
    with pytest.raises(WrongResultError, match="d_w is wrong"):
        check_variant(replace(lost, main_grad=True), problem, expected)
    problem.drop_main_grads()
    with pytest.raises(WrongResultError, match="d_w is missing"):
        check_variant(lost, problem, expected)


def test_bf16_adds_to_main_grad_what_it_would_return() -> None:
    problem = small_problem()
    expected = problem.products(bf16_op)
    plain, adding = bf16_variants("BF16", bf16_op, "torch")
    assert [(variant.name, variant.main_grad) for variant in (plain, adding)] == [
        ("BF16", False), ("BF16 main_grad", True),
    ]  # fmt: skip
    (main_grad,) = problem.main_grads.values()
    for _ in range(2):
        found = problem.products(adding.op)
    assert found["d_w"] is main_grad
    assert torch.equal(main_grad, 2 * expected["d_w"].float())
    assert torch.equal(found["d_a"], expected["d_a"])


def test_between_uses_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_problem()
    variants = auto_variants(PRODUCT, SHAPE)
    made: list[int] = []
    right = WeightCache.__init__

    def remember(cache: WeightCache, weight: Tensor) -> None:
        made.append(1)
        right(cache, weight)

    monkeypatch.setattr(WeightCache, "__init__", remember)
    for uses in (1, 2):
        with in_use(variants["cached"], problem) as (forward, backward):
            for _ in range(2):
                backward(forward())
        assert len(made) == uses
    with in_use(variants["main_grad"], problem) as (forward, backward):
        backward(forward())
        assert hasattr(problem.arguments["w"], "main_grad")
    assert not hasattr(problem.arguments["w"], "main_grad")


def test_what_cannot_run_has_no_rows() -> None:
    nothing = replace(explain(CPU), selected={})
    assert fp8moe_variants(PRODUCT.run(SHAPE), PRODUCT.options(SHAPE), lambda **_: nothing) == []


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A torchao that computes in BF16 and remembers its last call."""
    call: dict[str, Any] = {}

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
            ctx.backend = SimpleNamespace(kind=SimpleNamespace(value="deepgemm"))
            return bf16_op(a, b.transpose(-2, -1), offs)

    def op(a: Tensor, b: Tensor, offs: Tensor, **options: Any) -> Tensor:
        call.update(options, shape=tuple(b.shape), strides=b.stride())
        out: Tensor = Product.apply(a, b, offs)
        return out

    module = ModuleType(peers._TORCHAO_MODULE)
    module._to_fp8_blockwise_then_scaled_grouped_mm = op  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, peers._TORCHAO_MODULE, module)
    monkeypatch.setattr("importlib.import_module", lambda name: sys.modules[name])
    return call


@pytest.mark.parametrize(("group_sizes", "padded"), [([128, 0, 256], False), ([121, 0, 79], True)])
def test_torchao_pads_only_where_it_must(torchao: dict[str, Any], group_sizes: list[int], padded: bool) -> None:
    problem = small_problem()
    variant = torchao_variant(group_sizes)
    out = problem.forward(variant.op)
    assert torchao["pad_token_groups_for_grouped_mm"] is padded
    assert torchao["shape"] == (3, 128, 256)
    assert torchao["strides"][1] == 1  # column-major for each expert, as it demands
    assert torchao["out_dtype"] is torch.bfloat16
    assert torch.equal(out, problem.forward(bf16_op))
    assert variant.computed_by(out) == "deepgemm"
    assert not variant.is_ours


def test_a_torchao_without_the_op_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, peers._TORCHAO_MODULE, None)
    with pytest.raises(ModuleNotFoundError, match="torchao"):
        small_problem().forward(torchao_variant([200]).op)


def test_an_output_of_nobody_known() -> None:
    assert torchao_variant([200]).computed_by(small_problem().forward(bf16_op)) == "unknown"
