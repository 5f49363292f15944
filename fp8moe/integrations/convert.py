"""`convert`: fp8moe in a model that somebody else wrote."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from fp8moe.config import FP8Config, check_config
from fp8moe.gemm.explain import explain
from fp8moe.integrations.handwritten import FP8Forward, HandWritten, expert_parameters, recognize
from fp8moe.integrations.report import ExpertsReport, Report, what_runs
from fp8moe.modules import SwiGLUExperts

Named: TypeAlias = Sequence[tuple[str, nn.Module]]
"""Modules, and where they are in the model."""
Filter: TypeAlias = Callable[[nn.Module, str], bool]
Undo: TypeAlias = Callable[[], None]
Recognizer: TypeAlias = Callable[[Named, FP8Config, Filter], tuple[list[ExpertsReport], Callable[[], list[Undo]]]]
"""Looks through a model: what will run each experts module that it knows, those that it cannot convert included, and a
function that converts the others. The filter is asked about experts alone."""

AS_BEFORE = "as before"
LEFT_ALONE = "filter_fn leaves it alone"


@dataclass(frozen=True)
class Conversion(Report):
    """What `convert` did; `print` it."""

    undos: list[Undo] = field(default_factory=list, repr=False, compare=False)

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.converted or not self.experts else f"{text}\nnothing was converted"

    @property
    def converted(self) -> int:
        """How many modules fp8moe computes now."""
        return sum(entry.runs.startswith("fp8moe") for entry in self.experts)

    def undo(self) -> None:
        """Give the modules their own computation back. Parameters keep what training made of them."""
        while self.undos:
            self.undos.pop()()


def convert(
    model: nn.Module,
    config: FP8Config | None = None,
    filter_fn: Filter | None = None,
    *,
    strict: bool = False,
) -> Conversion:
    """Let fp8moe compute the experts of a model that somebody else wrote.

    Only the computation is swapped. Parameters, their names, `state_dict` and the classes' other methods stay as they
    are, so optimizers and checkpoints do too. Call it on the model as it will be trained, before FSDP, DDP or
    `torch.compile` wrap it. Experts are found

    - in models of Hugging Face transformers: modules that it dispatches (`use_experts_implementation`), as with
      `set_experts_implementation`;
    - in hand-written modules: two or three parameters of three dimensions, `(E, I, H)` and the like, in any order, each
      transposed or not, and nothing else; with a `forward` that takes `(hidden, topk_ids, topk_weights)`,
      `(hidden, topk_weights, topk_ids)` or `(rows, num_tokens_per_expert)`. Such a module is converted only if its own
      forward, run on random numbers, is SwiGLU with the usual gradients.

    Args:
        model: any model, or an experts module.
        config: how the GEMMs compute; defaults to `FP8Config()`.
        filter_fn: called with an experts module and its name in the model; False leaves the module alone.
        strict: raise if there is nothing to convert, or experts that cannot be converted; the model is unchanged then.

    Returns:
        a report: each experts module, what runs it now, and why; `undo()` takes the conversion back.

    Raises:
        TypeError: `model` or `config` is of the wrong type.
        ValueError: `strict`, and the message is the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    config = FP8Config() if config is None else config
    check_config(config)
    entries: dict[str, ExpertsReport] = {}
    swaps = []
    named = list(model.named_modules())
    for look_through in _recognizers(named):
        rest = [(name, module) for name, module in named if not _is_within(name, entries)]
        found, swap = look_through(rest, config, filter_fn or (lambda module, name: True))
        entries |= {entry.name: entry for entry in found}
        swaps.append(swap)
    in_order = tuple(entries[name] for name, _ in named if name in entries)
    nothing = "no module has parameters of experts that fp8moe knows, (E, I, H) and the like, so nothing was converted"
    report = Conversion(in_order, nothing)
    left = [entry for entry in in_order if entry.runs == AS_BEFORE and entry.why != LEFT_ALONE]
    if strict and (left or not report.converted):
        table = Report(in_order, nothing)
        raise ValueError(f"strict, and there are no experts or not all can be converted; with strict=False:\n{table}")
    for swap in swaps:
        report.undos.extend(swap())
    return report


def _recognizers(named: Named) -> Iterator[Recognizer]:
    """The frameworks' own first. None is imported that the model is not made with."""
    yield _own
    if "transformers" in sys.modules and any(hasattr(type(module), "_apply_gate") for _, module in named):
        yield _in_transformers
    yield _hand_written


def _is_within(name: str, found: dict[str, ExpertsReport]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") or not outer for outer in found)


def _own(named: Named, config: FP8Config, wanted: Filter) -> tuple[list[ExpertsReport], Callable[[], list[Undo]]]:
    """What needs no conversion."""
    found = []
    for name, module in named:
        if isinstance(module, SwiGLUExperts | FP8Forward):
            its_config = module.config if isinstance(module, SwiGLUExperts) else module._fp8moe.config
            found.append(_converted(name, module, its_config))
    return found, list


def _hand_written(
    named: Named, config: FP8Config, wanted: Filter
) -> tuple[list[ExpertsReport], Callable[[], list[Undo]]]:
    found, ways = [], []
    for name, module in named:
        parameters = expert_parameters(module)
        if not parameters:
            continue
        way = recognize(module, config) if wanted(module, name) else LEFT_ALONE
        if isinstance(way, HandWritten):
            ways.append((module, way))
            found.append(_converted(name, module, config))
        else:
            why = f"found {', '.join(parameters)}, but not converted, because {way}" if way != LEFT_ALONE else way
            found.append(ExpertsReport(name, type(module).__name__, AS_BEFORE, why))

    def swap() -> list[Undo]:
        for module, way in ways:
            way.swap_into(module)
        return [partial(HandWritten.take_out_of, module) for module, _ in ways]

    return found, swap


def _in_transformers(
    named: Named, config: FP8Config, wanted: Filter
) -> tuple[list[ExpertsReport], Callable[[], list[Undo]]]:
    import fp8moe.integrations.transformers as hf

    found, chosen = [], []
    experts = [(name, module) for name, module in named if hf.is_experts(module)]
    for name, module in experts:
        reason = hf.why_not(module) if wanted(module, name) else LEFT_ALONE
        if reason is None:
            chosen.append(module)
            found.append(_converted(name, module, config))
        else:
            found.append(ExpertsReport(name, type(module).__name__, AS_BEFORE, reason))

    def swap() -> list[Undo]:
        shared = {id(module.config): module.config for module in chosen}.values()
        name = hf.name_for(config) if chosen else ""
        return [
            _set_implementation(
                name, [module for module in chosen if module.config is theirs],
                everyone=sum(module.config is theirs for _, module in experts),
            )
            for theirs in shared
        ]  # fmt: skip

    return found, swap


def _converted(name: str, module: nn.Module, config: FP8Config) -> ExpertsReport:
    device = next(module.parameters()).device
    explanation = explain(None if device.type == "meta" else device, config)
    runs, why = what_runs(explanation, False)
    if runs == "fp8moe":
        why = "sizes decide between FP8 and BF16: ask fp8moe.explain(layer=(T, k, H, I, E))"
    return ExpertsReport(name, type(module).__name__, runs, why)


def _set_implementation(name: str, experts: list[Any], everyone: int) -> Undo:
    """Of modules that share a configuration: in it, or in a copy if some of `everyone` who shares it are left alone."""
    shared = experts[0].config
    if everyone == len(experts):
        before = shared._experts_implementation
        shared._experts_implementation = name
        return lambda: setattr(shared, "_experts_implementation", before)
    own = copy.copy(shared)
    own._experts_implementation = name
    for module in experts:
        module.config = own

    def undo() -> None:
        for module in experts:
            module.config = shared

    return undo
