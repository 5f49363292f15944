"""Steps: they learn, at the rate of the schedule, and stop before they break something."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch

from fp8moe.demo.data import load_corpus
from fp8moe.demo.settings import PRECISIONS, Precision
from fp8moe.demo.training import Trainer, learning_rate, resolve_device

from .support import tiny_config


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_falls_on_what_it_sees_and_on_what_it_does_not(precision: Precision, text: Path) -> None:
    config = tiny_config(steps=50, lr=1e-2, warmup=10)
    trainer = Trainer(config, precision, load_corpus(str(text), config.seq_len))
    before = trainer.validate()
    records = [trainer.train_step() for _ in range(config.steps)]
    assert trainer.done
    assert [record["step"] for record in records] == list(range(1, 51))
    assert records[0]["loss"] == pytest.approx(5.545, abs=1e-3)
    assert before == pytest.approx(5.545, abs=1e-3)
    assert fmean(record["loss"] for record in records[-5:]) < 2.2
    assert trainer.validate() < 2.2
    assert all(record["tokens_per_second"] == pytest.approx(128 / record["seconds"]) for record in records)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    config = tiny_config(steps=100, warmup=9, lr=0.5)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.25, rel=0.03)
    assert 0 < rates[-1] < 1e-3
    # The rate of a step is that of the optimizer when it takes the step.
    assert learning_rate(tiny_config(steps=2, warmup=5), 0) == pytest.approx(tiny_config().lr / 6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(poison: str, text: Path) -> None:
    config = tiny_config()
    trainer = Trainer(config, "fp8", load_corpus(str(text), config.seq_len))
    trainer.train_step()
    if poison == "loss":
        with torch.no_grad():
            trainer.model.embedding.weight.fill_(float("nan"))
    else:
        trainer.model.embedding.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"fp8: at step 2 the loss is .*smaller --lr"):
        trainer.train_step()
    assert trainer.step == 1
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight.isnan(), before[name].isnan())
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())
        assert weight.grad is None


def test_both_precisions_see_the_same_batches(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    corpus = load_corpus(str(text), config.seq_len)
    seen: dict[str, list[torch.Tensor]] = {}
    for precision in PRECISIONS:
        trainer = Trainer(config, precision, corpus)
        batches = seen[precision] = []
        hook = trainer.model.register_forward_pre_hook(lambda _, args, batches=batches: batches.append(args[0]))
        trainer.train_step()
        trainer.train_step()
        hook.remove()
    assert all(map(torch.equal, seen["fp8"], seen["bf16"]))
    assert not torch.equal(*seen["fp8"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_microbatches_give_the_gradients_of_the_whole_batch(precision: Precision, text: Path) -> None:
    whole, parts = (tiny_config(balance_weight=0.0, microbatches=count) for count in (1, 2))
    parts = replace(parts, cache_weights=precision == "fp8")
    corpus = load_corpus(str(text), whole.seq_len)
    one, two = (Trainer(config, precision, corpus) for config in (whole, parts))
    for _ in range(3):
        first, second = one.train_step(), two.train_step()
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=0.02)
    assert one.validate() == pytest.approx(two.validate(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.torch.jit.script")
def test_traced_code_has_the_losses_of_eager_code(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # compiling takes a minute
    config = tiny_config(layers=2)
    corpus = load_corpus(str(text), config.seq_len)
    compiled, eager = (Trainer(replace(config, compile=compile), "fp8", corpus) for compile in (True, False))
    for _ in range(2):
        assert compiled.train_step()["loss"] == pytest.approx(eager.train_step()["loss"], rel=1e-4)
    assert compiled.validate() == pytest.approx(eager.validate(), rel=1e-4)
    assert compiled.state_dict()["model"].keys() == eager.state_dict()["model"].keys()


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device is '{name}'; this machine has cpu.*: pass one of them, or auto"):
            resolve_device(name)
