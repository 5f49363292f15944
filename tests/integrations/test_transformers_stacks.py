"""Trainers and adapters on top of transformers, as people use them: each runs, and FP8 runs in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8moe.gemm.emulated import Emulated
from tests.integrations.transformers_support import batch, build, hf, transformers
from tests.measures import assert_same_bits, sqnr

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about each other


@pytest.fixture
def wgrads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One element for each weight gradient that is computed."""
    calls: list[object] = []
    k_grouped = Emulated.k_grouped

    def counted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return k_grouped(self, *args, **kwargs)

    monkeypatch.setattr(Emulated, "k_grouped", counted)
    return calls


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that count up."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = batch(index, rows=1)[0]
        return {"input_ids": tokens, "labels": tokens}


class TestTrainer:
    def train(self, model: Any, folder: Path, resume: bool = False, **options: Any) -> list[float]:
        pytest.importorskip("accelerate")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **{"max_steps": 8, "save_strategy": "no", **options},
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Counting())
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def test_bf16_accumulation_and_checkpointing(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True}
        fp8 = self.train(build("Qwen3Moe"), tmp_path, **options)
        eager = self.train(build("Qwen3Moe", "eager"), tmp_path, **options)
        assert fp8 != eager
        assert fp8[-1] == pytest.approx(eager[-1], rel=0.03)
        assert fp8[-1] < 0.85 * fp8[0]

    def test_resumes_bit_for_bit(self, tmp_path: Path) -> None:
        """From the model that `from_pretrained` makes of the checkpoint: to one that is there already, Trainer itself
        does not bring experts that are stored one by one, whatever their implementation."""
        whole = build("Mixtral")
        options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        losses = self.train(whole, tmp_path, **options)
        (tmp_path / "checkpoint-4").rename(tmp_path / "later")
        resumed = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "checkpoint-2", experts_implementation="fp8moe"
        )
        assert self.train(resumed, tmp_path, resume=True, **options) == losses
        for expected, actual in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert_same_bits(actual, expected)


def test_trl_supervised_fine_tuning(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(40))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    texts = [" ".join(str((start + step) % 40) for step in range(4 + start % 9)) for start in range(64)]
    model = build("Qwen3Moe")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=True,
        packing=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model, args=arguments, processing_class=fast, train_dataset=datasets.Dataset.from_dict({"text": texts})
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]
    assert {entry.runs for entry in hf.report(trainer.model).experts} == {"fp8moe in FP8"}


class TestPEFT:
    def adapt(self, implementation: str = "fp8moe", **targets: Any) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **targets)
        return peft.get_peft_model(build("Qwen3Moe", implementation), config)

    def backward(self, model: Any) -> dict[str, Tensor]:
        tokens = batch(0)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    def test_adapters_on_attention_cost_no_weight_gradient_of_experts(self, wgrads: list[object]) -> None:
        adapted = self.adapt(target_modules=["q_proj", "v_proj"])
        gradients = self.backward(adapted)
        assert not wgrads
        assert gradients
        assert all("lora" in name for name in gradients)
        expected = self.backward(self.adapt("eager", target_modules=["q_proj", "v_proj"]))
        for name, gradient in gradients.items():
            assert sqnr(gradient, expected[name]) >= 12
        build("Qwen3Moe")(batch(0), labels=batch(0)).loss.backward()
        assert len(wgrads) == 4  # of two layers that are trained: what is counted

    @pytest.mark.parametrize("names", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
    def test_adapters_on_experts(self, names: list[str], wgrads: list[object]) -> None:
        targets: dict[str, Any] = {"target_modules": [], "target_parameters": [f"experts.{name}" for name in names]}
        adapted = self.adapt(**targets)
        assert {entry.runs for entry in hf.report(adapted).experts} == {"fp8moe in FP8"}
        gradients = self.backward(adapted)
        assert len(wgrads) == 2 * len(names)  # two layers; a weight without an adapter has none
        assert len(gradients) == 4 * len(names)
        expected = self.backward(self.adapt("eager", **targets))
        for name, gradient in gradients.items():
            assert sqnr(gradient, expected[name]) >= 12

    def test_adapters_on_experts_learn_and_merge(self) -> None:
        adapted = self.adapt(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        weights = [weight for weight in adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        losses = []
        for step in range(8):
            loss = adapted(input_ids=batch(step), labels=batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        with torch.no_grad():
            expected = adapted(input_ids=batch(0)).logits
            merged = adapted.merge_and_unload()
            assert not any(isinstance(module, nn.Module) and "lora" in name for name, module in merged.named_modules())
            assert sqnr(merged(input_ids=batch(0)).logits, expected) >= 30
