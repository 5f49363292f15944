"""Experts of Hugging Face transformers with `experts_implementation="fp8moe"` against their own eager forward."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8moe
from fp8moe import FP8Config
from tests.integrations.transformers_support import (
    aria_experts,
    build,
    build_experts,
    hf,
    lfm2_experts,
    qwen_experts,
    routed,
    run,
    with_eager,
)
from tests.measures import assert_same_bits, sqnr


class TestWhatItComputes:
    @pytest.mark.parametrize(
        "build_module", [qwen_experts, aria_experts, lfm2_experts], ids=["plain", "transposed", "F.silu"]
    )
    def test_equals_the_eager_experts(self, build_module: Any) -> None:
        module, inputs = build_module(), routed()
        for actual, expected in zip(run(module, *inputs), run(with_eager(module), *inputs), strict=True):
            assert actual.dtype == expected.dtype
            assert sqnr(actual, expected) >= 22.5

    @pytest.mark.parametrize("hidden_size", [64, 192])
    @pytest.mark.parametrize("build_module", [qwen_experts, aria_experts], ids=["plain", "transposed"])
    def test_hidden_sizes_that_are_no_multiples_of_128(self, build_module: Any, hidden_size: int) -> None:
        module, inputs = build_module(hidden_size=hidden_size), routed(hidden_size=hidden_size)
        assert hf.why_not(module) is None
        for actual, expected in zip(run(module, *inputs), run(with_eager(module), *inputs), strict=True):
            assert sqnr(actual, expected) >= 22

    def test_is_moe_forward(self) -> None:
        module, (hidden, ids, weights) = qwen_experts(), routed()
        expected = fp8moe.moe_forward(hidden, ids, weights, module.gate_up_proj, module.down_proj)
        assert_same_bits(module(hidden, ids, weights), expected)

    def test_ids_of_no_expert_add_nothing(self) -> None:
        module, (hidden, ids, weights) = qwen_experts(), routed()
        ids[::3, 1] = 4  # what expert parallelism gives to choices of other ranks
        ids[0] = 4
        out = module(hidden, ids, weights)
        assert (out[0] == 0).all()
        kept = weights.detach().where(ids < 4, 0.0)
        assert sqnr(out, with_eager(module)(hidden, ids.where(ids < 4, 0), kept)) >= 22.5

    def test_autocast(self) -> None:
        module, inputs = qwen_experts(), routed()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(*inputs)
        assert out.dtype == torch.float32  # that of hidden_states, as with transformers' own
        assert sqnr(out, with_eager(module)(*inputs)) >= 22.5

    def test_bf16(self) -> None:
        module, (hidden, ids, weights) = qwen_experts().bfloat16(), routed()
        out = module(hidden.bfloat16(), ids, weights)
        assert out.dtype == torch.bfloat16
        assert sqnr(out, with_eager(module)(hidden.bfloat16(), ids, weights)) >= 22

    def test_a_parametrized_weight_is_computed_once(self) -> None:
        """As PEFT puts LoRA on experts."""
        calls = []

        class Adapted(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                calls.append(weight)
                return weight * 2

        module, inputs = qwen_experts(), routed()
        nn.utils.parametrize.register_parametrization(module, "down_proj", Adapted())
        assert hf.cache_weights(module) == 0
        calls.clear()
        out = module(*inputs)
        assert len(calls) == 1
        assert sqnr(out, with_eager(module)(*inputs)) >= 22.5


Experts = tuple[str, str, dict[str, Any]]
"""The family of a class, the start of its name, and the sizes in its configuration."""
KINDS: dict[str, Experts] = {
    "biases, interleaved, transposed, a clamped gate": (
        "gpt_oss", "GptOss", {"hidden_size": 128, "intermediate_size": 72, "num_local_experts": 4},
    ),
    "no gate": (
        "nemotron_h", "NemotronH", {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 4},
    ),
    "GELU": ("gemma4", "Gemma4", {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4}),
    "a clamped gate": (
        "deepseek_v4", "DeepseekV4", {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 4},
    ),
    "sizes": ("qwen3_moe", "Qwen3Moe", {"hidden_size": 128, "moe_intermediate_size": 99, "num_experts": 4}),
}  # fmt: skip


class TestOtherKinds:
    @pytest.mark.parametrize("case", KINDS)
    @pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
    def test_close_to_eager_and_the_same_compiled(self, case: str) -> None:
        family, prefix, sizes = KINDS[case]
        module, inputs = build_experts(family, prefix, **sizes), routed()
        assert hf.why_not(module) is None
        found = run(module, *inputs)
        for actual, expected in zip(found, run(with_eager(module), *inputs), strict=True):
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            assert sqnr(actual, expected) >= 20
        torch.compiler.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_same_bits(compiled(*inputs), found[0])


REFUSED: dict[str, tuple[Experts, str]] = {
    "a norm": (
        ("muse_spark", "MuseSpark", {"moe_hidden_size": 128, "moe_intermediate_size": 128, "num_local_experts": 4}),
        "normalizes",
    ),
    "an activation": (
        (
            "qwen3_moe",
            "Qwen3Moe",
            {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4, "hidden_act": "gelu"},
        ),
        "its gate is gelu(gate) * up, which fp8moe does not compute",
    ),
}


class TestWhatItRefuses:
    @pytest.mark.parametrize("case", REFUSED)
    def test_says_why_and_falls_back(self, case: str) -> None:
        (family, prefix, sizes), words = REFUSED[case]
        module, inputs = build_experts(family, prefix, **sizes), routed()
        reason = hf.why_not(module)
        assert words in reason
        with pytest.warns(UserWarning, match=type(module).__name__) as caught:
            out = module(*inputs)
        assert reason in str(caught[0].message)
        with warnings.catch_warnings():  # once for each class
            warnings.simplefilter("error")
            module(*inputs)
        module.config._experts_implementation = "grouped_mm"
        assert_same_bits(out, module(*inputs))
        assert out.abs().max() > 0

    def test_strict_raises(self) -> None:
        module = qwen_experts(hidden_act="gelu")
        hf.register(strict=True)
        with pytest.raises(ValueError, match="cannot compute Qwen3MoeExperts: its gate is gelu"):
            module(*routed())
        assert hf.report(module).experts[0].runs == "nothing: it raises"

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_other_activations(self, activation: str) -> None:
        assert "its gate is" in hf.why_not(qwen_experts(hidden_act=activation))

    @pytest.mark.parametrize("activation", ["silu", "swish"])
    def test_spellings_of_silu(self, activation: str) -> None:
        assert hf.why_not(qwen_experts(hidden_act=activation)) is None

    def test_other_dtypes(self) -> None:
        assert "torch.float64" in hf.why_not(qwen_experts().double())
        assert "float8_e4m3fn" in hf.why_not(qwen_experts().to(torch.float8_e4m3fn))

    def test_modules_that_transformers_does_not_dispatch(self) -> None:
        assert "does not dispatch" in hf.why_not(nn.Linear(128, 128))

    def test_compiled_fallback(self) -> None:
        module, inputs = qwen_experts(hidden_act="gelu"), routed()
        with pytest.warns(UserWarning, match="its gate is gelu"):
            out = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
        assert sqnr(out, with_eager(module)(*inputs)) >= 60


class TestRegister:
    def test_names_with_options_of_their_own(self) -> None:
        config = FP8Config(scale_format=fp8moe.ScaleFormat.POW2)
        hf.register("fp8moe_pow2", config=config)
        module, (hidden, ids, weights) = qwen_experts(), routed()
        plain = module(hidden, ids, weights)
        module.config._experts_implementation = "fp8moe_pow2"
        pow2 = module(hidden, ids, weights)
        assert (pow2 != plain).any()
        assert_same_bits(
            pow2, fp8moe.moe_forward(hidden, ids, weights, module.gate_up_proj, module.down_proj, config=config)
        )

    @pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
    def test_other_options_reach_compiled_code(self) -> None:
        module, inputs = qwen_experts(), routed()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        plain = compiled(*inputs)
        hf.register(config=FP8Config(scale_format=fp8moe.ScaleFormat.POW2))
        assert (compiled(*inputs) != plain).any()
        assert_same_bits(compiled(*inputs), module(*inputs))

    @pytest.mark.parametrize("name", ["eager", "grouped_mm"])
    def test_names_of_transformers(self, name: str) -> None:
        with pytest.raises(ValueError, match="transformers uses itself"):
            hf.register(name)

    def test_config(self) -> None:
        with pytest.raises(TypeError, match="FP8Config"):
            hf.register(config="fast")


class TestReport:
    def test_lists_all_experts(self) -> None:
        model = build("Mixtral")
        report = hf.report(model, tokens=8192)
        assert [entry.name for entry in report.experts] == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
        assert {(entry.kind, entry.runs) for entry in report.experts} == {("MixtralExperts", "fp8moe in FP8")}
        header, row = str(report).splitlines()
        assert header.split() == ["experts", "class", "runs", "why"]
        assert row.startswith("model.layers.0.mlp.experts and 1 more  MixtralExperts  fp8moe in FP8  EMULATED: ")

    def test_asks_about_the_sizes_of_the_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def explain(*args: Any, **kwargs: Any) -> Any:
            asked.append((kwargs["layer"], kwargs["weight_cache"]))
            return fp8moe.explain(*args, **kwargs)

        monkeypatch.setattr(hf, "explain", explain)
        model = build("Mixtral")
        hf.cache_weights(model.model.layers[1])
        hf.report(model, tokens=8192)
        hf.report(aria_experts(), tokens=10, experts_per_token=3)
        assert asked == [((8192, 2, 128, 128, 8), False), ((8192, 2, 128, 128, 8), True), ((10, 3, 128, 256, 4), False)]

    def test_needs_to_know_how_many_experts_a_token_has(self) -> None:
        module = aria_experts()  # its configuration has another name for it
        with pytest.raises(ValueError, match="pass experts_per_token"):
            hf.report(module, tokens=10)

    def test_a_preference_that_cannot_be_met(self) -> None:
        hf.register(config=FP8Config(kernel_preference=fp8moe.KernelPreference.DEEPGEMM))
        (entry,) = hf.report(qwen_experts()).experts
        assert entry.runs == "nothing: it raises"
        assert "DEEPGEMM" in entry.why

    def test_another_implementation(self) -> None:
        (entry,) = hf.report(qwen_experts("eager")).experts
        assert entry.runs == "eager"
        assert "set_experts_implementation('fp8moe')" in entry.why
        (entry,) = hf.report(qwen_experts("eager", hidden_act="relu")).experts
        assert "its gate is ReLU" in entry.why

    def test_fallbacks(self) -> None:
        (entry,) = hf.report(qwen_experts(hidden_act="gelu")).experts
        assert entry.runs == "grouped_mm"
        assert "its gate is gelu" in entry.why

    def test_no_experts(self) -> None:
        assert str(hf.report(nn.Linear(2, 2))).startswith("no experts found")

    def test_a_model_without_memory(self) -> None:
        with torch.device("meta"):
            model = build("Qwen3Moe")
        assert len(hf.report(model).experts) == 2
        assert hf.report(model).experts[0].runs.startswith("fp8moe")
