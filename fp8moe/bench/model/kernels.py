"""Where the time of a step goes: its kernels, by what they are for, and the gaps between them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

GROUPS: tuple[tuple[str, str], ...] = (
    ("experts: GEMMs of rows, FP8", r"^m_grouped_kernel|sm90_fp8_gemm_1d2d"),
    ("experts: wgrad, FP8", r"^wgrad_kernel|^schedule_kernel|^scale_steps|sm90_fp8_gemm_1d1d"),
    ("experts: quantize weights", r"^quantize_weight|^transpose_codes|^find_changes"),
    ("experts: quantize activations", r"^quantize_activation|^quantize_long"),
    ("experts: activation and quantization", r"^quantize_swiglu|^gated_"),
    ("experts: routing and combine", r"^plan_groups|^ends_within|^count_|^scan_|^place_|^combine|^spread|"
     r"^part_sums|^block_sums|^unpad|^zero_unused"),
    ("experts: messages to other ranks", r"^pack_|^choose_ranks|^choice_places|^slots_within"),
    ("experts: monitor", r"^note_not_finite|^sample_sums"),
    ("experts: INT8", r"^int8_|^plan_tiles|^quantize_rows_kernel"),
    ("experts: GEMMs, BF16", r"GroupProblemShape|grouped_gemm"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("optimizer", r"multi_tensor|[Ff]used_?[Aa]dam"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK"),
    ("sort, index and scatter", r"sort|radix|index|scatter|gather|histogram|embedding"),
    ("compiled by PyTorch", r"^triton_"),
    ("copies and casts", r"copy|[Mm]emcpy|cat_|CatArray"),
    ("fill", r"[Mm]emset|[Ff]ill"),
    ("elementwise and reductions", r"at::native"),
)  # fmt: skip
"""What kernels are for, by their names; the first that matches."""
OTHER = "other"
CALLERS = 3
"""How far outwards it is told what launched a kernel."""


@dataclass(frozen=True)
class Launch:
    """One kernel, or copy, on the device."""

    name: str
    start_us: float
    duration_us: float
    op: str = ""
    """What launched it, if that is known."""


@dataclass(frozen=True)
class KernelShare:
    """What kernels of one kind take in a step."""

    name: str
    ms: float
    calls: float
    op: str = ""
    """What launched them, if they have that in common."""


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel)), OTHER)


def shares(launches: Iterable[Launch], steps: int) -> list[KernelShare]:
    """The kinds of kernels of `steps` steps, the costliest first."""
    return _summed((((kind_of(launch.name), ""), launch.duration_us) for launch in launches), steps)


def costliest(launches: Iterable[Launch], steps: int, kinds: Sequence[str], count: int) -> list[KernelShare]:
    """The `count` costliest single kernels of these kinds, apart for each op that launches them."""
    named = (((launch.name, launch.op), launch.duration_us) for launch in launches if kind_of(launch.name) in kinds)
    return _summed(named, steps)[:count]


def busy_us(launches: Iterable[Launch]) -> float:
    """How long at least one kernel ran."""
    total = end = 0.0
    for launch in sorted(launches, key=lambda launch: launch.start_us):
        launch_end = launch.start_us + launch.duration_us
        total += max(launch_end - max(launch.start_us, end), 0.0)
        end = max(end, launch_end)
    return total


def launches_of_ops(events: Iterable[Any]) -> list[Launch]:
    """The kernels that a profile of host and device ascribes to ops, each with what launched it."""
    return [
        Launch(kernel.name, 0.0, kernel.duration, _described(event))
        for event in events
        if not event.name.startswith(("cuda", "cuLaunch"))  # calls of the driver, which are no ops
        for kernel in event.kernels
    ]


def _described(event: Any) -> str:
    """An op with its shapes, then what it is part of, outwards: `aten::copy_ [[8, 2], [8, 2]] < aten::to`."""
    callers: list[str] = []
    parent = event.cpu_parent
    while parent is not None and len(callers) < CALLERS:
        callers.append(parent.name.removeprefix("autograd::engine::evaluate_function: "))
        parent = parent.cpu_parent
    shapes = [shape for shape in event.input_shapes or () if shape]
    return " < ".join(dict.fromkeys([f"{event.name} {shapes}" if shapes else event.name, *callers]))


def _summed(durations: Iterable[tuple[tuple[str, str], float]], steps: int) -> list[KernelShare]:
    totals: dict[tuple[str, str], tuple[float, int]] = {}
    for key, microseconds in durations:
        total, calls = totals.get(key, (0.0, 0))
        totals[key] = total + microseconds, calls + 1
    found = [KernelShare(name, total / steps / 1e3, calls / steps, op) for (name, op), (total, calls) in totals.items()]
    return sorted(found, key=lambda share: -share.ms)
