"""Hugging Face models with `experts_implementation="fp8moe"` against transformers' own eager experts."""

import copy
import importlib
import json
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8moe
from fp8moe import FP8Config
from tests.measures import assert_same_bits, sqnr

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fp8moe.integrations.transformers", exc_type=ImportError)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
    },
    "Mixtral": {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 8},
    "DeepseekV3": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "Olmoe": {"intermediate_size": 128, "num_key_value_heads": 2, "num_experts": 8},
}


def build(name: str, implementation: str | None = "fp8moe", **options: Any) -> Any:
    """A small model, the same parameters for every implementation."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **MODELS[name], **options)
    return transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, dtype=torch.float32
    )


def batch(seed: int, rows: int = 4) -> Tensor:
    """Sequences `(rows, 32)` that count up from a random token in steps of one to three."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, most, (rows, 1), generator=generator) for most in (64, 4))
    return (start + step * torch.arange(32)) % 64


def experts_class(family: str, prefix: str) -> tuple[type[Any], type[Any]]:
    """The experts class of a family of models, and the class of its configuration."""
    modeling, configuration = (
        importlib.import_module(f"transformers.models.{family}.{kind}_{family}")
        for kind in ("modeling", "configuration")
    )
    names = (f"{prefix}{suffix}" for suffix in ("TextConfig", "Config"))
    config = next(getattr(configuration, name) for name in names if hasattr(configuration, name))
    text = "Text" if hasattr(modeling, f"{prefix}TextExperts") else ""
    return getattr(modeling, f"{prefix}{text}Experts"), config


def build_experts(family: str, prefix: str, implementation: str = "fp8moe", **sizes: Any) -> Any:
    torch.manual_seed(0)
    experts, config = experts_class(family, prefix)
    module = experts(config(**sizes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    module.config._experts_implementation = implementation
    return module


def qwen_experts(implementation: str = "fp8moe", **options: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 4}
    return build_experts("qwen3_moe", "Qwen3Moe", implementation, **(sizes | options))


def aria_experts(hidden_size: int = 128) -> Any:
    return build_experts("aria", "Aria", hidden_size=hidden_size, intermediate_size=256, moe_num_experts=4)


def lfm2_experts() -> Any:
    return build_experts("lfm2_moe", "Lfm2Moe", hidden_size=128, moe_intermediate_size=256, num_experts=4)


def all_experts() -> Iterator[Any]:
    """A module of every class that transformers dispatches, without memory, if a default configuration makes one."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "\n@use_experts_implementation" not in path.read_text():
            continue
        modeling = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        classes = [value for value in vars(modeling).values() if isinstance(value, type)]
        configs = [kind for kind in classes if issubclass(kind, transformers.PreTrainedConfig)]
        for kind in classes:
            if kind.__module__ == modeling.__name__ and hasattr(kind, "_apply_gate"):
                yield from islice(filter(hf.is_experts, map(partial(try_to_make, kind), configs)), 1)


def try_to_make(kind: type[Any], config: type[Any]) -> Any:
    """None if the configuration is of something else, or leaves out sizes by default."""
    try:
        with torch.device("meta"):
            return kind(config())
    except (AttributeError, TypeError):
        return None


def routed(tokens: int = 50, num_experts: int = 4, hidden_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weights, ids = torch.randn(tokens, num_experts).softmax(-1).topk(2)
    return hidden, ids, weights.detach().requires_grad_()


def run(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs and of the parameters."""
    inputs = (hidden, weights, *module.parameters())
    out = module(hidden, ids, weights)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def with_eager(module: Any) -> Any:
    eager = copy.deepcopy(module)
    eager.config._experts_implementation = "eager"
    return eager


def losses(model: Any, steps: int, microbatches: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        loss = torch.zeros(())
        for microbatch in range(microbatches):
            tokens = batch(step * microbatches + microbatch)
            part = model(tokens, labels=tokens).loss / microbatches
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss))
    return history


@pytest.fixture(autouse=True)
def _as_imported() -> Iterator[None]:
    """Every test finds the defaults, and no class that has been warned of."""
    hf._warned.clear()
    yield
    hf.register()


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

    @pytest.mark.filterwarnings("ignore")  # transformers, of its own configurations
    def test_equals_eager_in_every_class_that_it_accepts(self) -> None:
        hidden, ids, weights = routed()
        compared = []
        for module in all_experts():
            if "multiple of" in (hf.why_not(module) or "multiple of"):  # small weights in place of those
                gate_up, down = torch.randn(4, 256, 128) / 11, torch.randn(4, 128, 128) / 11
                shapes = (gate_up.mT, down.mT) if module.is_transposed else (gate_up, down)
                module.gate_up_proj, module.down_proj = (nn.Parameter(weight) for weight in shapes)
                module.num_experts = 4
                module.config._experts_implementation = "fp8moe"
                actual = module(hidden, ids, weights)
                module.config._experts_implementation = "eager"
                assert sqnr(actual, module(hidden, ids, weights)) >= 22.5, type(module).__name__
                compared.append(type(module).__name__)
        assert len(compared) >= 40
        assert {"Qwen3MoeExperts", "MixtralExperts", "AriaExperts", "JambaExperts"} <= set(compared)

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


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_have_the_gradients_of_eager(self, name: str) -> None:
        fp8, eager, tokens = build(name), build(name, "eager"), batch(0)
        for model in (fp8, eager):
            model(tokens, labels=tokens).loss.backward()
        for actual, expected in zip(fp8.parameters(), eager.parameters(), strict=True):
            # 18 to 25 dB, as noise sends single tokens of later layers to other experts.
            assert sqnr(actual.grad, expected.grad) >= 12

    @pytest.mark.parametrize("name", MODELS)
    def test_train_like_eager(self, name: str) -> None:
        fp8, eager = losses(build(name), 12), losses(build(name, "eager"), 12)
        assert fp8 != eager
        assert fp8[0] == pytest.approx(eager[0], rel=1e-3)
        assert fp8[-1] == pytest.approx(eager[-1], rel=0.03)
        assert fp8[-1] < 0.8 * fp8[0]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_bit(self, reentrant: bool) -> None:
        plain, checkpointed = build("Qwen3Moe"), build("Qwen3Moe")
        checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls: list[object] = []
        checkpointed.model.layers[1].mlp.experts.register_forward_pre_hook(lambda *_: calls.append(None))
        tokens = batch(0)
        for model in (plain, checkpointed):
            model.train()
            model(tokens, labels=tokens).loss.backward()
        assert len(calls) == 2  # once more in backward
        for expected, actual in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            assert_same_bits(actual.grad, expected.grad)

    def test_gradient_accumulation_with_and_without_cached_weights(self) -> None:
        plain, cached = build("Mixtral"), build("Mixtral")
        assert hf.cache_weights(cached) == 2
        expected = losses(plain, 4, microbatches=2)
        assert losses(cached, 4, microbatches=2) == expected
        assert expected[-1] < 0.95 * expected[0]
        for weight, other in zip(plain.parameters(), cached.parameters(), strict=True):
            assert_same_bits(other, weight)

    @pytest.mark.filterwarnings("ignore")  # of PyTorch, about one rank
    @pytest.mark.usefixtures("one_rank")
    def test_fsdp(self) -> None:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        plain, sharded = build("Mixtral"), build("Mixtral")
        for layer in sharded.model.layers:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
        assert hf.cache_weights(sharded) == 0
        assert {entry.runs for entry in hf.report(sharded).experts} == {"fp8moe in FP8"}
        assert losses(sharded, 3) == losses(plain, 3)

    @pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
    @pytest.mark.parametrize("cached", [False, True])
    def test_a_compiled_layer(self, cached: bool) -> None:
        model = build("Qwen3Moe")
        if cached:
            hf.cache_weights(model)
        layer, hidden = model.model.layers[0], torch.randn(2, 24, 128, requires_grad=True)
        position_embeddings = model.model.rotary_emb(hidden, torch.arange(24)[None])
        results = []
        for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            out = call(hidden, position_embeddings=position_embeddings)
            gradients = torch.autograd.grad(out.square().sum(), (hidden, *layer.parameters()))
            results.append([out, *gradients])
        for expected, actual in zip(*results, strict=True):
            assert sqnr(actual, expected) >= 40

    def test_checkpoints_are_as_they_were(self, tmp_path: Path) -> None:
        model, tokens = build("Mixtral"), batch(0)
        losses(model, 1)
        hf.cache_weights(model)
        model.save_pretrained(tmp_path)
        assert "fp8moe" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
        load = transformers.AutoModelForCausalLM.from_pretrained
        loaded = load(tmp_path, experts_implementation="fp8moe")
        for (name, expected), (other, actual) in zip(
            model.state_dict().items(), loaded.state_dict().items(), strict=True
        ):
            assert name == other
            assert_same_bits(actual, expected)
        with torch.no_grad():
            assert_same_bits(loaded(tokens).logits, model.eval()(tokens).logits)
        # The choice is not stored, and report() says so.
        forgotten = load(tmp_path)
        assert {entry.runs for entry in hf.report(forgotten).experts} == {"grouped_mm"}
        forgotten.set_experts_implementation("fp8moe")
        with torch.no_grad():
            assert_same_bits(forgotten(tokens).logits, loaded(tokens).logits)


REFUSED: dict[str, tuple[tuple[str, str, dict[str, Any]], str]] = {
    "a bias": (
        ("gpt_oss", "GptOss", {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4}),
        "biases",
    ),
    "no gate": (
        ("nemotron_h", "NemotronH", {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 4}),
        "no gate",
    ),
    "GELU": (
        ("gemma4", "Gemma4", {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4}),
        "activation is GELUTanh",
    ),
    "a norm": (
        ("muse_spark", "MuseSpark", {"moe_hidden_size": 128, "moe_intermediate_size": 128, "num_local_experts": 4}),
        "normalizes",
    ),
    "a clamped gate": (
        ("deepseek_v4", "DeepseekV4", {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 4}),
        "gate of its own",
    ),
    "sizes": (
        ("qwen3_moe", "Qwen3Moe", {"hidden_size": 128, "moe_intermediate_size": 96, "num_experts": 4}),
        "I is 96",
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
        module = qwen_experts(moe_intermediate_size=96)
        hf.register(strict=True)
        with pytest.raises(ValueError, match="cannot compute Qwen3MoeExperts: I is 96"):
            module(*routed())
        assert hf.report(module).experts[0].runs == "nothing: it raises"

    def test_interleaved_weights(self) -> None:
        module = qwen_experts()
        module.is_concatenated = False
        assert "interleaved" in hf.why_not(module)

    @pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh"])
    def test_other_activations(self, activation: str) -> None:
        assert "activation" in hf.why_not(qwen_experts(hidden_act=activation))

    @pytest.mark.parametrize("activation", ["silu", "swish"])
    def test_spellings_of_silu(self, activation: str) -> None:
        assert hf.why_not(qwen_experts(hidden_act=activation)) is None

    def test_other_dtypes(self) -> None:
        assert "torch.float64" in hf.why_not(qwen_experts().double())
        assert "float8_e4m3fn" in hf.why_not(qwen_experts().to(torch.float8_e4m3fn))

    def test_modules_that_transformers_does_not_dispatch(self) -> None:
        assert "does not dispatch" in hf.why_not(nn.Linear(128, 128))

    def test_compiled_fallback(self) -> None:
        module, inputs = qwen_experts(moe_intermediate_size=96), routed()
        with pytest.warns(UserWarning, match="I is 96"):
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
        assert "activation" in entry.why

    def test_fallbacks(self) -> None:
        (entry,) = hf.report(qwen_experts(moe_intermediate_size=96)).experts
        assert entry.runs == "grouped_mm"
        assert "I is 96" in entry.why

    def test_no_experts(self) -> None:
        assert str(hf.report(nn.Linear(2, 2))).startswith("no experts found")

    def test_a_model_without_memory(self) -> None:
        with torch.device("meta"):
            model = build("Qwen3Moe")
        assert len(hf.report(model).experts) == 2
        assert hf.report(model).experts[0].runs.startswith("fp8moe")
