"""`watch`: the monitor of a model."""

import math
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fp8moe.autograd.expert_mlp import Observation
from fp8moe.autograd.observed import enter, entered, leave
from fp8moe.devices import is_capturing
from fp8moe.monitor.call import Call, Seen
from fp8moe.monitor.checks import Checks, Found, Log
from fp8moe.monitor.history import History, Measured
from fp8moe.monitor.layers import experts_of
from fp8moe.monitor.reading import NotFinite, Reading
from fp8moe.monitor.statistics import from_sums
from fp8moe.monitor.thresholds import Alert, MonitorWarning, Thresholds
from fp8moe.monitor.transfer import Shipment
from fp8moe.quantize.sample_sums import NUM_SUMS

Writer = Callable[[Reading], None]

GOLDEN = (math.sqrt(5) - 1) / 2
"""Samples lie at multiples of it, of which none come close to each other for long."""

CHECKS_EVERY = 10
"""Steps from one sending of what checks have found to the next."""

_watched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def watch(
    model: nn.Module | None = None,
    *,
    every: int = 100,
    optimizer: Optimizer | None = None,
    count_forwards: bool = True,
    steps_taken: int = 0,
    thresholds: Thresholds | None = None,
    writers: Sequence[Writer] = (),
    warn: bool = True,
) -> "Monitor":
    """Watch the experts of a model while it trains.

        monitor = fp8moe.monitor.watch(model, every=100, optimizer=optimizer)
        ...
        logger.log(monitor.read().as_dict())

    Each call of a layer in training mode, with gradients on, is checked for NaN and infinity, on the device, forward
    and backward. In each `every`-th step, the first included, operands are measured on a sample, and rows counted.
    Nothing makes the host wait. What is measured arrives some steps later by itself; then writers get it, and warnings
    are given. Results of the model are the same bits.

    Seen is eager code that fp8moe computes. Of compiled code, CUDA graphs and layers that fp8moe does not compute
    there is nothing to see, and readings say which layers they lack.

    Args:
        model: whose experts to watch: `SwiGLUExperts`, `ExpertParallelExperts`, and those of transformers, torchtitan
            and `convert` that fp8moe computes. As it trains, or before something wraps it. None: only what
            `Monitor.layer` names.
        every: steps from one reading to the next.
        optimizer: whose steps are the steps. By default each forward of `model` in training mode is one; so with
            several microbatches a step pass the optimizer.
        count_forwards: False: you call `Monitor.step` after each step; so it is without `model` and `optimizer`.
        steps_taken: before now, in a run that is resumed.
        thresholds: when to warn; defaults to `Thresholds()`.
        writers: called with each reading, as it arrives: `JsonLines`, `TensorBoard`, or a function of your own.
        warn: whether to give a `MonitorWarning` for each threshold that is passed: once, until it is over.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `every` or `steps_taken` is out of range, the model has no experts, or is watched already.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module or None")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer or None")
    thresholds = Thresholds() if thresholds is None else thresholds
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds is {thresholds!r}; it must be a Thresholds, such as Thresholds(underflow=0.1)")
    for name, value, least in (("every", every, 1), ("steps_taken", steps_taken, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an int")
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    monitor = Monitor(every, steps_taken, thresholds, writers, warn)
    if model is not None:
        monitor._attach(model)
    if optimizer is not None:
        monitor._counts_by_itself = True
        monitor._handles.append(optimizer.register_step_post_hook(lambda *_: monitor._advance()))
    elif model is not None and count_forwards:
        monitor._counts_by_itself, monitor._model = True, model
        monitor._handles.append(model.register_forward_pre_hook(monitor._count_forward))
    return monitor


class Monitor:
    """What `watch` returns. A context manager too: it closes itself at the end."""

    def __init__(
        self, every: int, steps_taken: int, thresholds: Thresholds, writers: Sequence[Writer], warn: bool
    ) -> None:  # fmt: skip
        self._every, self._warn, self._writers = every, warn, tuple(writers)
        self._first_forward = True
        self._counts_by_itself = False
        self._model: nn.Module | None = None
        self._layers: dict[str, _Layer] = {}
        self._modules: list[nn.Module] = []
        self._handles: list[Any] = []
        self._log = Log()
        self._on_their_way: deque[Shipment] = deque()
        self._history = History(thresholds)
        self._latest: Reading | None = None
        self._last_sent = 0
        self._warned: set[tuple[str, str, str]] = set()
        self._begin_step(steps_taken + 1)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that are watched."""
        return tuple(self._layers)

    def latest(self) -> Reading | None:
        """The newest reading that has arrived; None before the first. It does not wait."""
        self._receive(wait=False)
        return self._newest()

    def read(self) -> Reading | None:
        """The newest reading, with all that has been seen so far. It waits for the device. Call it between two steps:
        of a step that is sampled, what comes after it is lost. None if no layer has a name yet."""
        self._finish()
        if self._latest is None and self._layers:
            self._arrived(self._step, {})
        return self._newest()

    def step(self) -> None:
        """A step has been taken. For `count_forwards=False`, and without a model or an optimizer.

        Raises:
            RuntimeError: steps are counted by themselves.
        """
        if self._counts_by_itself:
            raise RuntimeError("steps are counted already: pass count_forwards=False and no optimizer to watch")
        self._advance()

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """What `moe_forward`, `swiglu_experts`, `grouped_mm` or `ep_moe_forward` compute inside is of this layer.

        with monitor.layer("layers.3"):
            out = fp8moe.moe_forward(...)
        """
        layer = self._layer(name)
        layer.begin()
        with entered(layer):
            yield

    def close(self) -> None:
        """Wait for the last reading, and watch no longer. `latest` goes on to return it."""
        self._finish()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._modules:
            _watched.discard(module)
        self._modules.clear()
        self._model = None

    def __deepcopy__(self, _: object) -> "Monitor":
        """A copy of a model has its hooks too: they know that it is not the one to watch."""
        return self

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _newest(self) -> Reading | None:
        """The newest reading, and what checks have found since."""
        reading, first = self._latest, self._history.not_finite
        if reading is None or first is None or reading.not_finite is first:
            return reading
        kept = tuple(alert for alert in reading.alerts if alert.statistic != "result")
        self._latest = replace(reading, not_finite=first, alerts=(first.alert, *kept))
        return self._latest

    def _finish(self) -> None:
        """Wait for all that has been seen."""
        self._send_checks()
        self._send_seen()
        self._receive(wait=True)

    def _attach(self, model: nn.Module) -> None:
        found = experts_of(model)
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no experts to watch: no SwiGLUExperts, and no module with parameters "
                "(E, I, H) and the like. Watch functions with watch(every=...) and Monitor.layer"
            )
        for name, modules in found.items():
            if any(module in _watched for module in modules):
                raise ValueError(f"{name} is watched already: close() the other monitor first")
        for name, modules in found.items():
            layer = self._layer(name)
            for module in modules:
                _watched.add(module)
                self._modules.append(module)
                self._handles += [
                    module.register_forward_pre_hook(layer.before_forward, prepend=True),
                    module.register_forward_hook(layer.after_forward, always_call=True),
                ]

    def _layer(self, name: str) -> "_Layer":
        return self._layers.setdefault(name, _Layer(self, name))

    def _count_forward(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or module is not self._model or not _trains(module) or _is_in_backward():
            return
        if self._first_forward:
            self._first_forward = False
        else:
            self._advance()

    def _advance(self) -> None:
        if is_capturing():  # no step, and no time to look for what has arrived
            return
        if self._samples or self._step % CHECKS_EVERY == 0:
            self._send_checks()
        if self._samples:
            self._send_seen()
            if self._last_sent != self._step:  # nothing was seen
                self._arrived(self._step, {})
        self._begin_step(self._step + 1)
        self._receive(wait=False)

    def _begin_step(self, step: int) -> None:
        self._step, self._samples = step, (step - 1) % self._every == 0
        self._log.begin(step)

    def _report(self, found: Found) -> None:
        """Of a device. Those of other devices may be older; of the same step, the first to come."""
        first = self._history.not_finite
        if first is None or found.step < first.step:
            first = self._history.not_finite = NotFinite(found.step, found.layer, found.name)
            self._warn_of([first.alert], over=False)

    def _send_checks(self) -> None:
        self._on_their_way += self._log.send(self._report)

    def _send_seen(self) -> None:
        """After the checks: a reading tells what was not finite up to its end."""
        by_device: dict[torch.device, list[tuple[str, Seen]]] = {}
        for name, layer in self._layers.items():
            seen, layer.seen = layer.seen, None
            if seen is not None and seen.tokens is not None:
                by_device.setdefault(seen.tokens.device, []).append((name, seen))
        step, left = self._step, len(by_device)
        measured: dict[str, Measured] = {}

        def arrived(of_device: dict[str, Measured]) -> None:
            nonlocal left
            measured.update(of_device)
            left -= 1
            if not left:
                self._arrived(step, {name: measured[name] for name in self._layers if name in measured})

        if by_device:
            self._last_sent = step
        for layers in by_device.values():
            self._on_their_way.append(_shipment_of(layers, arrived))

    def _receive(self, *, wait: bool) -> None:
        while self._on_their_way and (wait or self._on_their_way[0].is_here):
            self._on_their_way.popleft().receive()

    def _arrived(self, step: int, measured: dict[str, Measured]) -> None:
        unseen = [name for name in self._layers if name not in measured]
        reading = self._latest = self._history.reading(step, measured, unseen)
        for writer in self._writers:
            writer(reading)
        self._warn_of(reading.alerts, over=True)

    def _warn_of(self, alerts: Sequence[Alert], *, over: bool) -> None:
        """Of what is new. `over` says that what is not among them is over."""
        known = set(self._warned)
        keys = {alert.key for alert in alerts}
        self._warned = keys if over else known | keys
        if self._warn:
            for alert in alerts:
                if alert.key not in known:
                    warnings.warn(alert.message, MonitorWarning, stacklevel=2)


class _Layer:
    """Implements `Watched`."""

    def __init__(self, monitor: Monitor, name: str) -> None:
        self._monitor, self._name = monitor, name
        self.seen: Seen | None = None
        self._checks: dict[tuple[str, bool], Checks] = {}
        self._is_on = True
        self._products = 0
        self._forwards = self._recomputed = 0

    def before_forward(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or module not in _watched:
            return
        self.begin(_trains(module))
        enter(self)

    def after_forward(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and module in _watched:
            leave()

    def __deepcopy__(self, _: object) -> "_Layer":
        """As `Monitor`'s."""
        return self

    def begin(self, is_on: bool = True) -> None:
        """A forward begins; `is_on` if it is one of training."""
        self._is_on, self._products = is_on, 0

    def layer(self) -> Observation | None:
        return self._call("", is_first=True)

    def product(self) -> Observation | None:
        self._products += 1
        return self._call(f"product{self._products - 1}.", is_first=self._products == 1)

    def _call(self, prefix: str, *, is_first: bool) -> Observation | None:
        if not self._is_on:
            return None
        monitor, counts = self._monitor, self._counts(is_first)
        checks = self._checks.get((prefix, counts))
        if checks is None:
            checks = self._checks[prefix, counts] = Checks(monitor._log, self._name, prefix, counts)
        if not monitor._samples:
            return checks
        if self.seen is None:
            self.seen = Seen(monitor._step, monitor._step * GOLDEN % 1)
        return Call(checks, self.seen)

    def _counts(self, is_first: bool) -> bool:
        """Whether this forward is to be seen. Checkpointing computes one more in backward: if the first had gradients
        on, as it mostly has, it has been seen; in the reentrant way it had not, and this is the one to be seen."""
        if not _is_in_backward():
            self._forwards += is_first
            return True
        self._recomputed += is_first
        return self._recomputed > self._forwards


def _shipment_of(layers: Sequence[tuple[str, Seen]], arrived: Callable[[dict[str, Measured]], None]) -> Shipment:
    """Of the layers of one device."""
    values = [
        value.flatten()
        for _, seen in layers
        if seen.tokens is not None
        for value in (seen.tokens.double(), *seen.sums)
    ]  # fmt: skip
    rows, sizes = [(name, seen.rows, len(seen.sums)) for name, seen in layers], [len(value) for value in values]

    def unpack(sent: Tensor) -> None:
        numbers = iter(sent.split(sizes))
        measured = {}
        for name, places, count in rows:
            ends = next(numbers)
            sums = [row for _ in range(count) for row in next(numbers).view(-1, NUM_SUMS).tolist()]
            operands = {operand: from_sums(sums[place]) for operand, place in places.items()}
            measured[name] = Measured(operands, ends.diff(prepend=ends.new_zeros(1)).int().tolist())
        arrived(measured)

    return Shipment(torch.cat(values), unpack)


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _is_in_backward() -> bool:
    """Whether this thread runs a backward: a forward within it is that of checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)
