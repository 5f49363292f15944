"""Training steps of a Hugging Face MoE model that FSDP2 shards over the ranks."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fp8moe.bench.distributed.ranks import Ranks
from fp8moe.bench.figures import Failure
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.memory import peak_bytes
from fp8moe.bench.model.measure import LEARNING_RATE, Workload
from fp8moe.bench.timing import Budget, Stopwatch, Timing, measure_in_turns, ready

MAX_LOSS_GAP = 0.02
"""Of the first loss from that of BF16, as a share."""


def shard_layers(model: nn.Module) -> None:
    """Each decoder layer by itself, as most do, and the rest; all in the dtype of the parameters, BF16."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)


def shard_layers_in_fp8(model: nn.Module) -> None:
    """The same, with the experts' weights gathered in FP8."""
    from fp8moe.integrations.transformers import gather_in_fp8  # needs transformers

    shard_layers(model)
    gather_in_fp8(model)


@dataclass(frozen=True)
class ShardedWay:
    """A way to train the model."""

    name: str
    experts: str
    """The implementation of experts in transformers."""
    shard: Callable[[nn.Module], None]


WAYS = (
    ShardedWay("BF16: grouped_mm, bf16 gather", "grouped_mm", shard_layers),
    ShardedWay("fp8moe, bf16 gather", "fp8moe", shard_layers),
    ShardedWay("fp8moe, FP8 gather", "fp8moe", shard_layers_in_fp8),
)
"""The baseline first."""


@dataclass(frozen=True)
class StepFigures:
    """What one way took. Each time is of the slowest rank."""

    name: str
    backward: Timing
    """Forward and backward, with the gathers and the reduction of gradients."""
    whole: Timing
    """With the optimizer."""
    speed_against_bf16: float
    """The baseline's time for a whole step over this one's."""
    tokens_per_second: float
    """Of a rank."""
    peak_bytes: int | None
    """Of a step, above the shards of parameters and optimizer; of the rank that holds most; None on a CPU."""
    losses: tuple[float, float]
    """Of the first training step and of the last, the mean of all ranks."""


class ShardedTrainee:
    """A model whose parameters are the same for all ways, its optimizer, and tokens of this rank."""

    def __init__(self, way: ShardedWay, workload: Workload, ranks: Ranks) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        config = workload.model.config(workload.layers)
        with torch.device(ranks.device):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=workload.model.attention,
                experts_implementation=way.experts,
            )  # fmt: skip
        way.shard(self.model)
        self.model.train()
        self.model.config.use_cache = False
        generator = torch.Generator().manual_seed(ranks.rank)
        tokens = torch.randint(config.vocab_size, (workload.batch, workload.length), generator=generator)
        self.tokens = tokens.to(ranks.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def forward_and_backward(self) -> Tensor:
        """The loss on this rank."""
        loss: Tensor = self.model(self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update(self, loss: Tensor) -> Tensor:
        """One step of the optimizer, after `forward_and_backward`, whose loss it returns."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def step(self) -> Tensor:
        """A whole training step; its loss."""
        return self.update(self.forward_and_backward())


def measure_steps(
    workload: Workload, ranks: Ranks, stopwatch: Stopwatch, budget: Budget, progress: Callable[[str], None]
) -> list[StepFigures | Failure]:
    """Each way first trains the same weights, which warms it up and gives its losses. Then all take turns."""
    import fp8moe.integrations.transformers  # noqa: F401  # registers "fp8moe"

    trainees: dict[str, ShardedTrainee] = {}
    losses: dict[str, tuple[float, float]] = {}
    failures: dict[str, Failure] = {}
    for way in WAYS:
        progress(f"training with {way.name}")
        trainee = ShardedTrainee(way, workload, ranks)
        curve = torch.stack([trainee.step() for _ in range(workload.training_steps)])[[0, -1]]
        first, last = ranks.gathered(curve.double()).mean(0).tolist()
        try:
            _check_loss(first, losses[WAYS[0].name][0] if losses else first)
        except WrongResultError as error:
            failures[way.name] = Failure(way.name, way is not WAYS[0], f"WrongResultError: {error}")
            continue
        trainees[way.name], losses[way.name] = trainee, (first, last)
    progress("timing")
    set_ups = [ready(trainee.forward_and_backward, trainee.update) for trainee in trainees.values()]
    laps = dict(zip(trainees, measure_in_turns(set_ups, stopwatch, budget), strict=True))
    base = next(iter(laps.values())).whole().median_ms

    def figures(name: str, trainee: ShardedTrainee) -> StepFigures:
        whole = laps[name].whole()
        peak = int(ranks.gathered(torch.tensor(peak_bytes(trainee.step, ranks.device) or 0)).max())
        tokens = workload.tokens / whole.median_ms * 1e3
        return StepFigures(
            name, laps[name].stage(0), whole, base / whole.median_ms, tokens, peak or None, losses[name]
        )  # fmt: skip

    found = {name: figures(name, trainee) for name, trainee in trainees.items()}
    return list(itertools.chain(found.values(), failures.values()))


def _check_loss(loss: float, expected: float) -> None:
    if not abs(loss - expected) <= MAX_LOSS_GAP * expected:  # of NaN it is not
        raise WrongResultError(f"the first loss is {loss:.4f}; it must be within {MAX_LOSS_GAP:.0%} of {expected:.4f}")
