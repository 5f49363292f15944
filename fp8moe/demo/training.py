"""One model in one precision: a step of training, a validation, and the state that continues it exactly."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from fp8moe.demo.data import Corpus
from fp8moe.demo.model import MoELanguageModel
from fp8moe.demo.settings import Precision, RunConfig

_MAX_GRAD_NORM = 1.0
_TEMPERATURE = 0.8


class StepRecord(TypedDict):
    """What is known of a step once it is taken; one line of `metrics.jsonl`."""

    step: int
    """Steps taken, this one included."""
    loss: float
    """Mean cross-entropy of the step's batch before the step, in nats per byte or token, without the balance
    loss."""
    balance_loss: float
    """The layers' mean load-balancing loss: 1 is even."""
    grad_norm: float
    """Before clipping."""
    lr: float
    seconds: float
    tokens_per_second: float
    val_loss: NotRequired[float]
    """Mean cross-entropy on the held-out text after the step, in nats per byte or token, where it was measured."""


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up to `config.lr`, then a half cosine to zero."""
    warmup = min(1.0, (step + 1) / (config.warmup + 1))
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def resolve_device(name: str) -> torch.device:
    """The device that a `--device` names.

    Raises:
        ValueError: this machine has no such device.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in devices:
        raise ValueError(f"device is {name!r}; this machine has {', '.join(devices)}: pass one of them, or auto")
    return torch.device(name)


class Trainer:
    """A model, its optimizer, and how many steps they have taken."""

    def __init__(self, config: RunConfig, precision: Precision, corpus: Corpus) -> None:
        self.config = config
        self.precision = precision
        self.corpus = corpus
        self.device = resolve_device(config.device)
        self.step = 0
        # PyTorch looks at it once in a process, at the first product, which may be that of a run that is not
        # deterministic; a deterministic one after it would raise.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.manual_seed(config.seed)
        with torch.device(self.device):  # drawn where they train, in no time
            self.model = MoELanguageModel(config, precision, corpus.vocabulary)
        if config.compile:
            self.model.compile_parts()
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.model.parameters() if weight.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )

    @property
    def done(self) -> bool:
        return self.step >= self.config.steps

    def train_step(self) -> StepRecord:
        """Take one step.

        Raises:
            FloatingPointError: the loss or the gradient is not finite. The step was not taken.
        """
        start = time.perf_counter()
        config = self.config
        batch = self.corpus.batch(config.seed, self.step, config.batch_size, config.seq_len, config.bad_documents)
        losses = []
        with self._repeating():
            for inputs_BS, targets_BS in zip(*(part.chunk(config.microbatches) for part in batch), strict=True):
                loss, balance = self._losses(inputs_BS, targets_BS)
                ((loss + config.balance_weight * balance) / config.microbatches).backward()
                losses.append(torch.stack((loss.detach(), balance.detach())))
            loss, balance = torch.stack(losses).mean(dim=0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        # The one wait for the device in a step. It comes before the update: a step that is not finite changes nothing.
        loss_value, balance_value, norm_value = torch.stack((loss, balance, norm)).tolist()
        if not math.isfinite(loss_value + norm_value):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"{self.precision}: at step {self.step + 1} the loss is {loss_value}, the gradient norm {norm_value}; "
                "start a new run with a smaller --lr or a longer --warmup"
            )
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        seconds = time.perf_counter() - start
        return {
            "step": self.step,
            "loss": loss_value,
            "balance_loss": balance_value,
            "grad_norm": norm_value,
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": config.batch_size * config.seq_len / seconds,
        }

    @torch.no_grad()
    def validate(self) -> float:
        """The mean cross-entropy on the held-out text, in nats per byte or token."""
        config = self.config
        parts = config.microbatches
        batches = self.corpus.validation_batches(
            config.eval_batches * parts, config.batch_size // parts, config.seq_len
        )
        # Code for inference would have to be compiled anew.
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            return torch.stack([self._losses(*batch)[0] for batch in batches]).mean().item()

    @torch.no_grad()
    def sample(self, prompt: list[int], length: int) -> list[int]:
        """`length` bytes or tokens that go on from `prompt`, each as the model expects it after the last `seq_len`."""
        generator = torch.Generator().manual_seed(self.config.seed)
        text = list(prompt)
        for _ in range(length):
            tokens_BS = torch.tensor([text[-self.config.seq_len :]], device=self.device)
            with self._autocast():
                logits_BSV, _ = self.model(tokens_BS)
            probabilities = (logits_BSV[0, -1] / _TEMPERATURE).softmax(dim=-1).cpu()
            text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return text[len(prompt) :]

    def state_dict(self) -> dict[str, Any]:
        """All that the steps to come depend on: batches are a function of the step, and no step draws at random."""
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, on the CPU or on this trainer's device."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _losses(self, inputs_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        inputs_BS, targets_BS = inputs_BS.to(self.device), targets_BS.to(self.device)
        with self._autocast():
            loss, balance = self.model(inputs_BS, targets_BS)
        return loss, balance

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """While entered, attention and whatever else has a choice take algorithms whose sums have an order, forward and
        backward, and an operator that has no such algorithm raises."""
        if not (self.config.deterministic and self.device.type == "cuda"):
            yield
            return
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.backends.cuda.cudnn_sdp_enabled(),
        )
        # With `warn_only=True` the backward of attention would add up by atomics.
        torch.use_deterministic_algorithms(True, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
            torch.backends.cuda.enable_cudnn_sdp(before[3])

    def _autocast(self) -> torch.autocast:
        """On a CPU fp32: few have BF16 instructions, and the FP8 or BF16 GEMMs are emulated there in any case."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")
