"""Who computes: BF16, torchao, and each usable way of `fp8moe`. Here, the differentiable grouped product."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, KernelPreference, WeightCache
from fp8moe.bench.floor import Precision
from fp8moe.bench.guard import ONE_PRODUCT, Limits
from fp8moe.bench.peers import TORCHAO, torchao_backend, torchao_op
from fp8moe.bench.problem import Op
from fp8moe.bench.shapes import Routing
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.explain import Explanation
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import BLOCK

Explain = Callable[..., Explanation]
"""`fp8moe.explain` of one device, configuration and shape: only `weight_cache` is left to say."""


@dataclass(frozen=True)
class Variant:
    """One way to compute."""

    name: str
    op: Op
    precision: Precision
    """Of its tensor cores: decides the floor."""
    computed_by: Callable[[Tensor], str]
    """The kernels behind an output of `op`."""
    is_ours: bool
    """A failure of ours fails the run; a peer's is reported."""
    limits: Limits = ONE_PRODUCT
    """How close to BF16 it must come."""


def bf16_op(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """PyTorch's own, with its own gradient; other dtypes are cast, as autocast would."""
    return F.grouped_mm(a.bfloat16(), w.bfloat16().transpose(-2, -1), offs=offs).to(a.dtype)


BF16 = Variant("BF16", bf16_op, "bf16", lambda out: "torch grouped_mm", is_ours=False)
"""The baseline of every ratio and check."""


def torchao_variant(routing: Routing) -> Variant:
    """torchao's op, with its padding only where the groups need it."""
    aligned = routing is not Routing.RAGGED
    return Variant(TORCHAO, torchao_op(aligned), "fp8", torchao_backend, is_ours=False)


def fp8moe_variant(explanation: Explanation) -> Variant:
    """`fp8moe.grouped_mm` with the configuration explained."""
    return _op_variant(explanation, "", lambda w: {})


def fp8moe_variants(explain: Explain) -> list[Variant]:
    """`fp8moe_variant`; where that is FP8 also with the weight's gradient added to `w.main_grad`, and with the weight
    cached."""
    cache_of, plain = CacheOf(), explain()
    return [
        fp8moe_variant(plain),
        *in_fp8(
            _op_variant(plain, " main_grad", lambda w: {"main_grad": w.main_grad.transpose(-2, -1)}),
            _op_variant(explain(weight_cache=True), " cached", lambda w: {"weight_cache": cache_of(w)}),
        ),
    ]


def in_fp8(*variants: Variant) -> list[Variant]:
    """Those that compute in FP8: in BF16 their options change little or nothing."""
    return [variant for variant in variants if variant.precision == "fp8"]


class CacheOf:
    """The cache of a weight, which is made when it is first asked for; that of the last weight is kept."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def __call__(self, w: Tensor) -> WeightCache:
        if self._weight is not w:
            self._weight, self._cache = w, WeightCache(w)
        return self._cache


def _op_variant(explanation: Explanation, suffix: str, options: Callable[[Any], dict[str, Any]]) -> Variant:
    def op(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=explanation.config, **options(w))

    return our_variant(explanation, suffix, op)


def our_variant(explanation: Explanation, suffix: str, op: Op, limits: Limits = ONE_PRODUCT) -> Variant:
    """A variant of `fp8moe` by the name of its kernel preference and `suffix`."""
    return Variant(
        f"fp8moe {explanation.config.kernel_preference.value}{_tiles(explanation.config.wgrad_token_tile)}{suffix}",
        op,
        "bf16" if None in backends(explanation) else "fp8",
        partial(_constant, describe_backends(explanation)),
        is_ours=True,
        limits=limits,
    )


def _tiles(token_tile: int) -> str:
    return "" if token_tile == BLOCK else f" tiles of {token_tile}"


def with_token_tiles(explanations: Iterable[Explanation], token_tiles: Iterable[int]) -> list[Explanation]:
    """Each explanation for each `FP8Config.wgrad_token_tile`; who computes does not depend on it."""
    return [
        replace(explanation, config=replace(explanation.config, wgrad_token_tile=token_tile))
        for explanation in explanations
        for token_tile in token_tiles
    ]


def explanations_to_measure(device: torch.device, asked_for: Iterable[KernelPreference] | None) -> list[Explanation]:
    """What `fp8moe` comes to for each preference asked for; by default for AUTO and what else can be used.

    Raises:
        ValueError: a preference asked for cannot be used on `device`.
    """
    if asked_for is not None:
        return [_usable(device, preference) for preference in asked_for]
    found = [_explain(device, KernelPreference.AUTO)]
    for preference in KernelPreference:
        if _is_no_contender(preference, device):
            continue
        explanation = _explain(device, preference)
        # What AUTO is on a CPU for any shape needs no second row. On a GPU it depends on
        # the shape: what it takes for large ones is measured on small ones too.
        differs = device.type == "cuda" or backends(explanation) != backends(found[0])
        if explanation.selected and differs and preference is not KernelPreference.AUTO:
            found.append(explanation)
    return found


def backends_to_measure(
    device: torch.device, asked_for: Iterable[KernelPreference] | None, explanations: Iterable[Explanation]
) -> set[KernelPreference]:
    """Whose GEMMs to time one by one: those behind what was asked for; by default all, save the emulation on a GPU."""
    if asked_for is not None:
        return {backend for explanation in explanations for backend in backends(explanation) if backend is not None}
    return {
        preference
        for preference, backend in BACKENDS.items()
        if not _is_no_contender(preference, device) and any(not backend.missing(gemm, device) for gemm in Gemm)
    }


def backends(explanation: Explanation) -> tuple[KernelPreference | None, ...]:
    """Who computes forward, dgrad and wgrad; None is BF16."""
    return tuple(selected.backend for selected in explanation.selected.values())


def describe_backends(explanation: Explanation) -> str:
    """The backends in words: one if all three are the same."""
    names = {gemm: each.backend.value if each.backend else "BF16" for gemm, each in explanation.selected.items()}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{gemm.value} {name}" for gemm, name in names.items())


def _is_no_contender(preference: KernelPreference, device: torch.device) -> bool:
    """The emulation is there to be right; on a GPU it is measured only if it is asked for."""
    return preference is KernelPreference.EMULATED and device.type == "cuda"


def _usable(device: torch.device, preference: KernelPreference) -> Explanation:
    explanation = _explain(device, preference)
    if not explanation.selected:
        reasons = " ".join(map(str, explanation.lacks[preference]))
        raise ValueError(f"--backend {preference.value} cannot be used on {device}: {reasons}")
    return explanation


def _explain(device: torch.device, preference: KernelPreference) -> Explanation:
    return fp8moe.explain(device, FP8Config(kernel_preference=preference))


def _constant(text: str, out: Tensor) -> str:
    return text
