"""Who computes: BF16, peers, and each usable way of `fp8moe`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe import ActivationStorage, FP8Config, KernelPreference, WeightCache
from fp8moe.bench.guard import MIN_SQNR_DB
from fp8moe.bench.problem import Op
from fp8moe.gemm.explain import Explanation, explain

Run = Callable[..., Tensor]
"""An operation of `fp8moe`: of `Problem.arguments`, `config` and, perhaps, `weight_caches` and `main_grads`, one for
each weight."""
Explain = Callable[..., Explanation]
"""`fp8moe.explain` of one device, configuration and shape: only `weight_cache` is left to say."""


@dataclass(frozen=True)
class Variant:
    """One way to compute."""

    name: str
    op: Op
    computed_by: Callable[[Tensor], str]
    """The kernels behind an output of `op`."""
    is_ours: bool
    """A failure of ours fails the run; a peer's is reported."""
    min_sqnr_db: float = MIN_SQNR_DB
    """How close to BF16 output and gradients must come."""
    is_baseline: bool = False
    """PyTorch's own in BF16."""
    main_grad: bool = False
    """With the weights' gradients added to their `main_grad`: compared with baselines that do so."""
    release: Callable[[], object] = lambda: None
    """Gives back what `op` holds between calls."""


@dataclass(frozen=True)
class Option:
    """How an operation of `fp8moe` is used."""

    name: str
    cached: bool = False
    """With fresh weight caches."""
    kept: bool = False
    """With `FP8Config.keep_quantized_weights`."""
    main_grad: bool = False
    """With the weights' gradients added to their `main_grad`."""
    storage: ActivationStorage = ActivationStorage.BF16
    min_sqnr_db: float = MIN_SQNR_DB


def bf16_op(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """PyTorch's own, with its own gradient."""
    return F.grouped_mm(a, w.transpose(-2, -1), offs=offs)


class _AddToMainGrad(torch.autograd.Function):
    """A weight whose gradient is added to its `main_grad` as soon as it is made, and then freed: what Megatron does in
    a hook after accumulation."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad  # not saved: it changes
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(gradient)
        return None, None


def bf16_variants(name: str, op: Op, computed_by: str) -> tuple[Variant, Variant]:
    """One of PyTorch's ways, with BF16 gradients and with their sum in fp32 `main_grad`s."""

    def into_main_grads(*arguments: Any) -> Tensor:
        return op(*(_AddToMainGrad.apply(x, x.main_grad) if x.dim() == 3 else x for x in arguments))

    plain = Variant(name, op, lambda out: computed_by, is_ours=False, is_baseline=True)
    return plain, replace(plain, name=f"{name} main_grad", op=into_main_grads, main_grad=True)


def fp8moe_variants(run: Run, options: Sequence[Option], explain: Explain) -> list[Variant]:
    """The operation `run` with the configuration explained: with the first option, and where it is FP8 the others. None
    if the configuration cannot be met."""

    explained = [(option, explain(weight_cache=option.cached)) for option in options]
    return [
        _fp8moe_variant(run, option, explanation)
        for option, explanation in explained
        if explanation.selected and (option is options[0] or None not in _backends(explanation))
    ]


def _fp8moe_variant(run: Run, option: Option, explanation: Explanation) -> Variant:
    config = replace(explanation.config, activation_storage=option.storage, keep_quantized_weights=option.kept)
    caches: list[WeightCache] = []  # until they are released

    def op(*arguments: Tensor) -> Tensor:
        weights: list[Any] = [argument for argument in arguments if argument.dim() == 3]
        chosen: dict[str, Any] = {}
        if option.cached:
            if not caches:
                caches.extend(map(WeightCache, weights))
            chosen["weight_caches"] = tuple(caches)
        if option.main_grad:
            chosen["main_grads"] = tuple(weight.main_grad for weight in weights)
        return run(*arguments, config=config, **chosen)

    tiles = "" if config.wgrad_token_tile is None else f"tiles of {config.wgrad_token_tile}"
    return Variant(
        " ".join(filter(None, ("fp8moe", config.kernel_preference.value, tiles, option.name))),
        op,
        lambda out: describe_backends(explanation),
        is_ours=True,
        min_sqnr_db=option.min_sqnr_db,
        main_grad=option.main_grad,
        release=caches.clear,
    )


def preferences_to_measure(
    device: torch.device, asked_for: Iterable[KernelPreference] | None
) -> list[KernelPreference]:
    """What was asked for; by default AUTO, and what else can be used and differs from it.

    Raises:
        ValueError: a preference asked for cannot be used on `device`.
    """
    if asked_for is not None:
        for preference in asked_for:
            explanation = _explain(device, preference)
            if not explanation.selected:
                reasons = " ".join(map(str, explanation.lacks[preference]))
                raise ValueError(f"--backend {preference.value} cannot be used on {device}: {reasons}")
        return list(asked_for)
    # What AUTO takes depends on the shape: what it takes for large ones is measured on small ones too. On a CPU it is
    # the emulation for any shape.
    return [
        preference
        for preference in KernelPreference
        if preference is not KernelPreference.EMULATED and _explain(device, preference).selected
    ]


def backends_to_measure(device: torch.device, preferences: Iterable[KernelPreference]) -> set[KernelPreference]:
    """The backends behind these preferences, whose GEMMs are timed one by one."""
    found = {backend for preference in preferences for backend in _backends(_explain(device, preference))}
    return {backend for backend in found if backend is not None}


def describe_backends(explanation: Explanation) -> str:
    """The backends in words: one if all three are the same."""
    names = {gemm: choice.backend.value if choice.backend else "BF16" for gemm, choice in explanation.selected.items()}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{gemm.value} {name}" for gemm, name in names.items())


def _backends(explanation: Explanation) -> tuple[KernelPreference | None, ...]:
    """Who computes forward, dgrad and wgrad; None is BF16."""
    return tuple(choice.backend for choice in explanation.selected.values())


def _explain(device: torch.device, preference: KernelPreference) -> Explanation:
    return explain(device, FP8Config(kernel_preference=preference))
