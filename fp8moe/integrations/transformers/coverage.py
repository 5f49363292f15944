"""Which experts of the installed transformers fp8moe computes, as a table.

    python -m fp8moe.integrations.transformers.coverage

Every class that transformers dispatches is made, small, and its output and gradients are compared with those of its own
eager forward in fp32. The table is kept in docs/transformers-coverage.md.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fp8moe.integrations.transformers import is_experts, why_not
from fp8moe.integrations.transformers.gates import gate_of

HIDDEN_SIZE = INTERMEDIATE_SIZE = 128
NUM_EXPERTS, TOKENS, EXPERTS_PER_TOKEN = 4, 64, 2
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN_SIZE),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTERMEDIATE_SIZE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
}
"""The names of the sizes in the configurations of transformers."""
OUTPUT_DB, GRADIENT_DB = 23, 18
"""The least agreement of what counts as right: FP8 leaves 24 to 26 dB, and less of gradients where a gate has clamps:
rounding moves values across them."""


@dataclass(frozen=True)
class Coverage:
    """What fp8moe makes of one class."""

    kind: str
    model: str
    """The folder of its model in transformers."""
    weights: str
    """How its weights are stored, in transformers' words."""
    gate: str
    reason: str | None
    """Why fp8moe cannot compute it; None if it can."""
    output: float | None
    """SQNR of the output in dB, against eager; None if fp8moe cannot compute it."""
    gradient: float | None
    """That of the worst gradient, of inputs and parameters."""

    @property
    def is_right(self) -> bool:
        return self.output is None or (self.output >= OUTPUT_DB and (self.gradient or 0) >= GRADIENT_DB)

    @property
    def verdict(self) -> str:
        if not self.is_right:
            return "**wrong**"
        return "FP8" if self.reason is None else self.reason


def main() -> int:
    """Print the table; 1 if a class comes out wrong."""
    found = coverage()
    print(table(found))
    return int(not all(entry.is_right for entry in found))


def coverage() -> list[Coverage]:
    """Of every class that transformers dispatches, by model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers, of its own configurations
        return [_coverage_of(experts) for experts in all_experts()]


def table(found: list[Coverage]) -> str:
    """As Markdown."""
    lines = ["| experts | model | weights | gate | fp8moe | output | worst gradient |", "|---|---|---|---|---|---|---|"]
    for entry in found:
        figures = (f"{value:.1f} dB" if value is not None else "" for value in (entry.output, entry.gradient))
        row = (entry.kind, entry.model, entry.weights, f"`{entry.gate}`" if entry.gate else "", entry.verdict, *figures)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def all_experts() -> Iterator[Any]:
    """A small module of every class that `use_experts_implementation` decorates.

    Raises:
        RuntimeError: no configuration makes one of them.
    """
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "\n@use_experts_implementation" in path.read_text():
            modeling = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            for kind in [value for value in vars(modeling).values() if isinstance(value, type)]:
                if kind.__module__ == modeling.__name__ and hasattr(kind, "_apply_gate"):
                    yield _small(kind, modeling)


def _small(kind: type[Any], modeling: Any) -> Any:
    torch.manual_seed(0)
    # In some models a layer gives its experts a size of their own.
    is_told = "intermediate_size" in inspect.signature(kind).parameters
    options = {"intermediate_size": INTERMEDIATE_SIZE} if is_told else {}
    for config in [value for value in vars(modeling).values() if isinstance(value, type)]:
        if issubclass(config, transformers.PreTrainedConfig):
            try:
                with torch.device("meta"):
                    experts = kind(_with_small_sizes(config()), **options)
            except Exception:  # the configuration of something else, which fails in its own way
                continue
            if is_experts(experts):
                experts = experts.to_empty(device="cpu").float()
                for parameter in experts.parameters():
                    # Large enough that gates reach their clamps.
                    nn.init.normal_(parameter, std=4 * HIDDEN_SIZE**-0.5)
                return experts
    raise RuntimeError(
        f"no configuration of {modeling.__name__} makes {kind.__name__}: look up its sizes, add to SIZES"
    )


def _with_small_sizes(config: Any) -> Any:
    for name, size in SIZES.items():
        if hasattr(config, name):
            old = getattr(config, name)
            setattr(config, name, [size] * len(old) if isinstance(old, list | tuple) else size)
    return config


def _coverage_of(experts: Any) -> Coverage:
    gate, reason = gate_of(experts), why_not(experts)
    flags = ("is_transposed", "has_bias", "has_post_expert_norm")
    weights = [flag.split("_", 1)[1].replace("_", " ") for flag in flags if getattr(experts, flag)]
    if not experts.is_concatenated:
        weights.append("interleaved")
    output = gradient = None
    if reason is None:
        actual, expected = _run(experts, "fp8moe"), _run(experts, "eager")
        output, *gradients = map(_sqnr, actual, expected)
        gradient = min(gradients)
    model = type(experts).__module__.split(".")[-2]
    formula = "" if isinstance(gate, str) else str(gate)
    return Coverage(type(experts).__name__, model, ", ".join(weights) or "plain", formula, reason, output, gradient)


def _run(experts: Any, implementation: str) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters; the same inputs in every call."""
    generator = torch.Generator().manual_seed(0)
    hidden, dout = (torch.randn(TOKENS, HIDDEN_SIZE, generator=generator) for _ in range(2))
    scores = torch.randn(TOKENS, NUM_EXPERTS, generator=generator).softmax(-1)
    top_k_weights, top_k_index = scores.topk(EXPERTS_PER_TOKEN)
    inputs = (hidden.requires_grad_(), top_k_weights.requires_grad_(), *experts.parameters())
    experts.config._experts_implementation = implementation
    out = experts(hidden, top_k_index, top_k_weights)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def _sqnr(actual: Tensor, expected: Tensor) -> float:
    signal, noise = expected.double(), actual.double() - expected.double()
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


if __name__ == "__main__":
    sys.exit(main())
