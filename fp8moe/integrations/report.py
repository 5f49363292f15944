"""What runs the experts of a model, as a table."""

from dataclasses import dataclass
from itertools import groupby

from fp8moe.gemm.base import Gemm
from fp8moe.gemm.explain import Explanation


@dataclass(frozen=True)
class ExpertsReport:
    """What runs one experts module, and why."""

    name: str
    """Where the module is in the model; empty if it is the model."""
    kind: str
    """The name of its class."""
    runs: str
    """`fp8moe in FP8`, `fp8moe in BF16`, `fp8moe` (sizes decide between the two), or the framework's own way."""
    why: str


@dataclass(frozen=True)
class Report:
    """What runs the experts of a model; `print` it."""

    experts: tuple[ExpertsReport, ...]
    nothing: str
    """What it means if there are none."""

    def __str__(self) -> str:
        if not self.experts:
            return f"no experts found: {self.nothing}"
        lines = [("experts", "class", "runs", "why")]
        for what, alike in groupby(self.experts, key=lambda entry: (entry.kind, entry.runs, entry.why)):
            first, *others = (entry.name for entry in alike)
            lines.append((f"{first} and {len(others)} more" if others else first, *what))
        widths = [max(len(line[column]) for line in lines) for column in range(3)] + [0]
        return "\n".join("  ".join(map(str.ljust, line, widths)) for line in lines)


def what_runs(explanation: Explanation, sizes_are_known: bool) -> tuple[str, str]:
    """`runs` and `why` of an `ExpertsReport`, for experts that fp8moe computes.

    Args:
        explanation: of the module's config, and of its sizes if they are known.
        sizes_are_known: whether they are.
    """
    if not explanation.selected:
        preference = explanation.config.kernel_preference
        return "nothing: it raises", f"{preference} cannot run here: see fp8moe.explain()"
    if explanation.decider is not None and not sizes_are_known:
        return "fp8moe", "sizes decide between FP8 and BF16: see report(model, tokens=...)"
    selected = explanation.selected[Gemm.FORWARD]
    return f"fp8moe in {'BF16' if selected.backend is None else 'FP8'}", str(selected)
