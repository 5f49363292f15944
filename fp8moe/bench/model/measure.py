"""Train a whole model, with the experts of transformers and with ours, and measure its steps."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from fp8moe.bench.model.kernels import KernelShare, Launch, busy_us, costliest, launches_of_ops, shares
from fp8moe.bench.model.models import BenchModel
from fp8moe.bench.timing import Timing
from fp8moe.config import FP8Config

KEEPING = "fp8moe, weights kept"
EXPERTS = ("grouped_mm", "fp8moe", KEEPING)
"""Implementations of experts in transformers: its own, in BF16, and ours, also with `keep_quantized_weights`."""
OUTSIDE = ("copies and casts", "fill", "elementwise and reductions", "sort, index and scatter", "other")
"""Kinds of kernels that a compiler, or a better adapter, might do without."""
COSTLIEST = 15
"""How many of them are listed."""
ROUNDS, STEPS_A_ROUND, PROFILED_STEPS = 5, 3, 3
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Workload:
    """What is trained on."""

    model: BenchModel
    layers: int
    batch: int
    length: int
    training_steps: int
    """From the same weights on the same tokens, for the losses."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length


@dataclass(frozen=True)
class ModelResult:
    """What one way of computing the model took."""

    experts: str
    compiled: bool
    step_ms: float
    """Forward, backward and optimizer: the median of the rounds, each of which has the median of its steps."""
    backward_ms: float
    """Forward and backward alone, likewise."""
    step_range_ms: tuple[float, float]
    """Of the fastest round and of the slowest."""
    backward_range_ms: tuple[float, float]
    tokens_per_second: float
    peak_bytes: int | None
    losses: tuple[float, float]
    """Of the first and of the last training step."""
    busy_ms: float | None
    """How long a kernel ran in forward and backward; None where nobody counts."""
    kernels: tuple[KernelShare, ...]
    outside: tuple[KernelShare, ...]
    """The costliest kernels of `OUTSIDE`."""
    graph_breaks: int
    graphs: int
    """Compiled for all layers together: 1 if nothing is compiled twice."""

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.experts}, {'compiled' if self.compiled else 'eager'}"


class Trainee:
    """A model, its optimizer, and a batch of random tokens."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        config = workload.model.config(workload.layers)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=workload.model.attention,
                experts_implementation=EXPERTS[0],
            )  # fmt: skip
            self.tokens = torch.randint(config.vocab_size, (workload.batch, workload.length))
        self.model.train()
        self.model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self._initial = [parameter.detach().to("cpu", copy=True) for parameter in self.model.parameters()]
        self._compiled_calls: dict[tuple[str, nn.Module], Any] = {}

    def use(self, experts: str, compiled: bool) -> None:
        """Compute from now on with these experts; `compiled`: each decoder layer by itself, as users compile it."""
        self.model.set_experts_implementation(experts)
        for layer in self.model.model.layers:
            layer._compiled_call_impl = None
            if compiled:
                key = experts, layer
                if key not in self._compiled_calls:
                    layer.compile()
                    self._compiled_calls[key] = layer._compiled_call_impl
                layer._compiled_call_impl = self._compiled_calls[key]

    def restart(self) -> None:
        """Forget all training."""
        with torch.no_grad():
            for parameter, initial in zip(self.model.parameters(), self._initial, strict=True):
                parameter.copy_(initial)
        self.optimizer.state.clear()

    def forward_and_backward(self) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> Tensor:
        """A whole training step; its loss."""
        loss = self.forward_and_backward()
        self.update()
        return loss


def measure_model(
    workload: Workload, device: torch.device, compiled: bool, progress: Callable[[str], None]
) -> list[ModelResult]:
    """Each implementation of experts, eager and, if asked for, `compiled`.

    Each way first trains the same weights, which warms it up and gives its losses. Then all take turns, in random
    order.
    """
    from fp8moe.integrations.transformers import register  # the import registers "fp8moe"

    register(KEEPING, config=FP8Config(keep_quantized_weights=True))
    trainee = Trainee(workload, device)
    ways = list(itertools.product(EXPERTS, (False, True) if compiled else (False,)))
    losses, counts = {}, {}
    for experts, is_compiled in ways:
        progress(f"training with {experts}{', compiled' if is_compiled else ''}")
        trainee.restart()
        trainee.use(experts, is_compiled)
        with _counting() as count:
            curve = [trainee.step() for _ in range(workload.training_steps)]
        losses[experts, is_compiled] = (float(curve[0]), float(curve[-1]))
        counts[experts, is_compiled] = count[0]
    progress("timing")
    times = _time_in_turns(trainee, ways, device)

    results = []
    for experts, is_compiled in ways:
        progress(f"profiling {experts}{', compiled' if is_compiled else ''}")
        trainee.use(experts, is_compiled)
        trainee.step()
        peak = _peak_bytes(trainee, device)
        launches, with_ops = _launches(trainee, device), _launches_of_ops(trainee, device)
        step, both = times[experts, is_compiled]
        results.append(
            ModelResult(
                experts, is_compiled, step.median_ms, both.median_ms, (step.min_ms, step.max_ms),
                (both.min_ms, both.max_ms), workload.tokens / step.median_ms * 1e3, peak,
                losses[experts, is_compiled],
                busy_us(launches) / PROFILED_STEPS / 1e3 if launches else None,
                tuple(shares(launches, PROFILED_STEPS)), tuple(costliest(with_ops, 1, OUTSIDE, COSTLIEST)),
                *counts[experts, is_compiled],
            )
        )  # fmt: skip
    return results


def _time_in_turns(
    trainee: Trainee, ways: list[tuple[str, bool]], device: torch.device
) -> dict[tuple[str, bool], tuple[Timing, Timing]]:
    """Of a whole step, and of forward and backward: each round is a repetition."""
    order = random.Random(0)
    taken: dict[tuple[str, bool], list[list[tuple[float, float]]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in order.sample(ways, len(ways)):
            trainee.use(*way)
            trainee.step()
            steps = []
            for _ in range(STEPS_A_ROUND):
                marks = [_mark(device)]
                trainee.forward_and_backward()
                marks.append(_mark(device))
                trainee.update()
                marks.append(_mark(device))
                steps.append((_between(marks[0], marks[2]), _between(marks[0], marks[1])))
            taken[way].append(steps)
    return {
        way: (
            Timing.of([[step for step, _ in steps] for steps in rounds]),
            Timing.of([[both for _, both in steps] for steps in rounds]),
        )
        for way, rounds in taken.items()
    }


def _mark(device: torch.device) -> Any:
    """A point in time: on the device's own clock, where it has one."""
    if device.type != "cuda":
        return time.perf_counter() * 1e3
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end))


def _peak_bytes(trainee: Trainee, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    trainee.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _launches(trainee: Trainee, device: torch.device) -> list[Launch]:
    """The kernels of a few forwards and backwards; none where there is no GPU."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(PROFILED_STEPS):
            trainee.forward_and_backward()
            trainee.optimizer.zero_grad()  # or the next backward would add to gradients
        torch.cuda.synchronize(device)
    return [
        Launch(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    ]


def _launches_of_ops(trainee: Trainee, device: torch.device) -> list[Launch]:
    """Of one forward and backward, each with the op that launched it. To watch ops slows the host down, so `_launches`
    does not."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        trainee.forward_and_backward()
        torch.cuda.synchronize(device)
    trainee.optimizer.zero_grad()
    return launches_of_ops(profile.events())


@contextmanager
def _counting() -> Iterator[list[tuple[int, int]]]:
    """Graph breaks and graphs compiled in what runs within."""
    from torch._dynamo.utils import counters

    counters.clear()
    count: list[tuple[int, int]] = []
    yield count
    count.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
