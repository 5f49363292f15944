"""Whole models of transformers, trained with `experts_implementation="fp8moe"`."""

import json
from pathlib import Path

import pytest
import torch

from tests.integrations.transformers_support import MODELS, batch, build, hf, losses, transformers
from tests.measures import assert_same_bits, sqnr


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_have_the_gradients_of_eager(self, name: str) -> None:
        fp8, eager, tokens = build(name), build(name, "eager"), batch(0)
        for model in (fp8, eager):
            model(tokens, labels=tokens).loss.backward()
        for actual, expected in zip(fp8.parameters(), eager.parameters(), strict=True):
            # 18 to 25 dB, as noise sends single tokens of later layers to other experts.
            assert sqnr(actual.grad, expected.grad) >= 12

    @pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "DeepseekV3"])
    def test_train_like_eager(self, name: str) -> None:
        """Within noise: parameters that are perturbed by 2% move the end of an eager run by up to 5%."""
        fp8, eager = (
            [losses(build(name, implementation, seed=seed), 20) for seed in range(3)]
            for implementation in ("fp8moe", "eager")
        )
        assert fp8 != eager
        ends, ends_eager = ([sum(history[-5:]) / 5 for history in curves] for curves in (fp8, eager))
        assert ends == pytest.approx(ends_eager, rel=0.05)
        assert sum(ends) == pytest.approx(sum(ends_eager), rel=0.025)
        assert max(ends) < 0.8 * min(history[0] for history in fp8)

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
