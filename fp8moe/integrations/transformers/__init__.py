"""fp8moe as an experts implementation of Hugging Face transformers.

    import fp8moe.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="fp8moe")
    model.set_experts_implementation("fp8moe")  # or later
    print(fp8moe.integrations.transformers.report(model))

With expert parallelism, tokens travel to their experts in FP8:

    DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="fp8moe")

The import registers the implementation. Parameters, their names, optimizers and checkpoints stay as they are.
transformers does not store `experts_implementation` in a checkpoint: name it again at every `from_pretrained`.

Raises:
    ImportError: transformers is missing, or of another version; the message says what to install.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fp8moe import distributed
from fp8moe.autograd.moe import moe_forward
from fp8moe.checks import DEVICE_TYPES, FLOAT_DTYPES
from fp8moe.config import FP8Config, check_config
from fp8moe.distributed import Dispatch
from fp8moe.distributed.expert_parallel import check_options
from fp8moe.gate import Gate
from fp8moe.gemm.explain import explain
from fp8moe.integrations.report import ExpertsReport, Report, what_runs
from fp8moe.integrations.transformers.expert_parallel import FP8MoeEP, is_taken, register_ep
from fp8moe.integrations.transformers.gates import GateForm, gate_of
from fp8moe.integrations.transformers.upstream import ALL_EXPERTS_FUNCTIONS
from fp8moe.quantize.weight_cache import WeightCache

__all__ = ["cache_weights", "gather_in_fp8", "register", "report", "why_not"]

FALLBACK = "grouped_mm"
"""transformers' own implementation that computes what fp8moe cannot."""

Experts: TypeAlias = Any
"""A module of a class that `use_experts_implementation` decorates: it has the flags read here, and two weights."""


Routed: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Hidden states `(T, H)`, ids and weights `(T, k)`."""


def register(
    name: str = "fp8moe",
    *,
    config: FP8Config | None = None,
    strict: bool = False,
    dispatch: Dispatch = Dispatch.FP8,
) -> None:
    """Make `name` an experts implementation of transformers, and a way for tokens to reach the experts of other ranks.

    Importing this module calls `register()`. Call it again for other options, under the same name or another one:
    models may use several names side by side. A model that uses the name already takes the new options from its next
    forward on.

    Args:
        name: what to pass as `experts_implementation`, and as `ep_implementation` of a `DistributedConfig`.
        config: how the GEMMs compute; defaults to `FP8Config()`.
        strict: raise `ValueError` for experts that fp8moe cannot compute (see `why_not`). By default transformers'
            "grouped_mm" computes them, and a warning says why, once for each class.
        dispatch: in what rows travel where it is the `ep_implementation`; see `fp8moe.distributed.ep_moe_forward`.

    Raises:
        TypeError: `config` is not an `FP8Config`, or `dispatch` no `Dispatch`.
        ValueError: transformers uses `name` itself.
    """
    config = FP8Config() if config is None else config
    check_config(config)
    check_options(dispatch, None, None)
    its_own = ALL_EXPERTS_FUNCTIONS.get(name, None)
    if name == "eager" or is_taken(name) or not isinstance(its_own, _Implementation | None):
        raise ValueError(f"name is {name!r}, which transformers uses itself; choose another one, such as 'fp8moe'")
    ALL_EXPERTS_FUNCTIONS.register(name, _Implementation(config, strict, dispatch))
    register_ep(name)


def name_for(config: FP8Config) -> str:
    """The name of an implementation with this config. It is registered if there is none yet."""
    wanted = _Implementation(config, strict=False)
    names = [name for name in ALL_EXPERTS_FUNCTIONS if ALL_EXPERTS_FUNCTIONS[name] == wanted]
    if names:
        return names[0]
    number = next(number for number in count(2) if f"fp8moe_{number}" not in ALL_EXPERTS_FUNCTIONS)
    register(name := f"fp8moe_{number}", config=config)
    return name


def why_not(module: nn.Module) -> str | None:
    """Why fp8moe cannot compute this experts module, in one sentence; None if it can.

    Experts can be computed if transformers dispatches their class (`use_experts_implementation`) and fp8moe has their
    gate (`fp8moe.Gate`); with or without biases, of any size, however their weights are stored. The weights must be
    bf16, fp16 or fp32, on a CPU or CUDA device (or on the meta device, for a look ahead).
    """
    experts: Experts = module
    form = _form_or_reason(experts)
    return form if isinstance(form, str) else _why_not_its_weights(experts)


def cache_weights(model: nn.Module) -> int:
    """Keep the experts' weights in FP8 until they change; see `fp8moe.WeightCache`.

    It costs 2 bytes for each element of a weight, and pays with several microbatches a step. Call it on the model
    as it is trained: on its device, and sharded if it will be. Skipped are experts that fp8moe cannot compute, weights
    that are made anew for each forward (FSDP gathers them, expert or tensor parallelism shards them, a parametrization
    computes them, offloading loads them), and weights that are stored transposed. All these are quantized at each use.

    Returns:
        how many experts modules keep their weights now.
    """
    kept: list[Experts] = [module for module in model.modules() if is_experts(module) and why_not(module) is None]
    kept = [module for module in kept if not module.is_transposed]
    kept = [module for module in kept if all(_stays(module, getattr(module, name)) for name in _weights(module))]
    for module in kept:
        module._fp8moe_weight_caches = {name: WeightCache.of_parameter(module, name) for name in _weights(module)}
    return len(kept)


def gather_in_fp8(model: nn.Module) -> int:
    """Let FSDP2 gather the weights of all experts that fp8moe computes as FP8 codes and scales, half of the bytes.

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        fp8moe.integrations.transformers.gather_in_fp8(model)

    Call it once, after `fully_shard` and before the first forward; see `fp8moe.distributed.gather_in_fp8`. Experts that
    fp8moe cannot compute are gathered as they were.

    Returns:
        how many experts modules that concerns.

    Raises:
        ValueError: fp8moe is to compute none; or as `fp8moe.distributed.gather_in_fp8`.
    """
    computed: list[tuple[Experts, _Implementation]] = [
        (module, implementation)
        for module in model.modules()
        if is_experts(module) and why_not(module) is None
        for implementation in [ALL_EXPERTS_FUNCTIONS.get(cast(Any, module.config)._experts_implementation, None)]
        if isinstance(implementation, _Implementation)
    ]
    if not computed:
        raise ValueError(
            "model has no experts that fp8moe computes: load it with experts_implementation='fp8moe', or call "
            "model.set_experts_implementation('fp8moe'); fp8moe.integrations.transformers.report(model) says more"
        )
    for experts, implementation in computed:
        form, (gate_up, down) = cast(GateForm, _form_or_reason(experts)), _weights(experts)
        distributed.gather_in_fp8(
            experts, gate_up, down, config=implementation.config, gate=form.computed_as, interleaved=form.interleaved,
            stored_transposed=experts.is_transposed,
        )  # fmt: skip
    return len(computed)


@dataclass(frozen=True)
class _Implementation:
    """What transformers calls in place of the forward of an experts module."""

    config: FP8Config
    strict: bool
    dispatch: Dispatch = Dispatch.FP8

    def __call__(self, experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` `(T, H)`, the other two `(T, k)`; `(T, H)` of the dtype of `hidden_states`. Ids outside
        `0..E-1` add nothing: with expert parallelism of transformers' own they are the experts of other ranks."""
        return self.compute(experts, (hidden_states, top_k_index, top_k_weights), moe_forward, None)

    def compute(
        self, experts: Experts, routed: Routed, layer: Callable[..., Tensor], otherwise: Callable[..., Tensor] | None
    ) -> Tensor:
        """The same by `layer`, which is called as `moe_forward` is. What fp8moe cannot compute, `otherwise` does."""
        form = _form_or_reason(experts)
        if isinstance(form, str):
            return self._fall_back(form, experts, routed, otherwise)
        names = _weights(experts)
        gate_up, down = (getattr(experts, name) for name in names)  # once: a parametrization computes them here
        reason = _why_not_these(names, gate_up, down)
        if reason is not None:
            return self._fall_back(reason, experts, routed, otherwise)
        caches = (_cache_of(experts, names[0], gate_up), _cache_of(experts, names[1], down))
        biases = (getattr(experts, f"{names[0]}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
        if experts.is_transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        out = layer(
            *routed, gate_up, down,
            config=self.config, gate=cast(Gate, form.computed_as), biases=biases, interleaved=form.interleaved,
            weight_caches=caches,
        )  # fmt: skip
        return out.to(routed[0].dtype)

    def _fall_back(
        self, reason: str, experts: Experts, routed: Routed, otherwise: Callable[..., Tensor] | None
    ) -> Tensor:
        kind = type(experts).__name__
        if self.strict:
            raise ValueError(f"fp8moe cannot compute {kind}: {reason}")
        _warn_once(kind, reason)
        return ALL_EXPERTS_FUNCTIONS[FALLBACK](experts, *routed) if otherwise is None else otherwise(*routed)


_warned: set[str] = set()


@torch.compiler.assume_constant_result
def _warn_once(kind: str, reason: str) -> None:
    """Once for each class. torch.compile warns while it compiles."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"fp8moe cannot compute {kind}, {FALLBACK} does: {reason}", stacklevel=4)


def report(model: nn.Module, tokens: int | None = None, experts_per_token: int | None = None) -> Report:
    """What will run each experts module of `model`, and why.

    Args:
        model: any model; modules that transformers dispatches are looked at.
        tokens: how many tokens a forward has. On Hopper `KernelPreference.AUTO` decides by it between FP8 and BF16;
            without it the report leaves that open.
        experts_per_token: `k`; defaults to `num_experts_per_tok` of the module's configuration.

    Raises:
        ValueError: `tokens` is given, and `k` is neither given nor in the configuration.
    """
    named = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    nothing = "transformers dispatches none of this model's modules, so experts_implementation changes nothing"
    return Report(tuple(_report_of(name, module, tokens, experts_per_token) for name, module in named), nothing)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches the module: its class is decorated with `use_experts_implementation`."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_concatenated")


def _report_of(name: str, experts: Experts, tokens: int | None, experts_per_token: int | None) -> ExpertsReport:
    chosen, kind = experts.config._experts_implementation, type(experts).__name__
    ep: FP8MoeEP | None = getattr(experts, "_fp8moe_ep", None)
    implementation = ALL_EXPERTS_FUNCTIONS.get(chosen, None) if ep is None else ep.implementation
    reason = why_not(experts)
    if not isinstance(implementation, _Implementation):
        fix = "fp8moe can compute it: call model.set_experts_implementation('fp8moe')"
        return ExpertsReport(name, kind, str(chosen), fix if reason is None else f"nor can fp8moe: {reason}")
    if reason is not None:
        return ExpertsReport(name, kind, "nothing: it raises" if implementation.strict else FALLBACK, reason)
    if tokens is None:
        layer = None
    else:
        k = experts_per_token or getattr(experts.config, "num_experts_per_tok", None)
        if k is None:
            raise ValueError(f"{kind} has no num_experts_per_tok in its configuration: pass experts_per_token")
        layer = (tokens, k, *_sizes(experts, experts.down_proj), experts.num_experts)
    device = None if experts.down_proj.device.type == "meta" else experts.down_proj.device
    cached = all(_cache_of(experts, name, getattr(experts, name)) is not None for name in _weights(experts))
    config, by_fp8 = implementation.config, ep is not None and implementation.dispatch is Dispatch.FP8
    explanation = explain(
        device, replace(config, allow_bf16=False) if by_fp8 else config, layer=layer, weight_cache=cached
    )
    runs, why = what_runs(explanation, layer is not None)
    travel = "" if ep is None else f"; tokens travel to their ranks in {implementation.dispatch.name}"
    return ExpertsReport(name, kind, runs, why + travel)


def _form_or_reason(experts: Experts) -> GateForm | str:
    """The gate of experts that fp8moe computes, or why it cannot, as far as that is known before its weights are
    read; see `why_not`."""
    if not is_experts(experts):
        return "transformers does not dispatch this class: decorate it with use_experts_implementation"
    if experts.has_post_expert_norm:
        return "it normalizes what each expert returns, which fp8moe does not"
    form = gate_of(experts)
    if isinstance(form, GateForm) and form.computed_as is None:
        return _not_computed(form.activation, form.alpha, form.limit, form.up_offset, form.interleaved, form.has_gate)
    return form


@torch.compiler.assume_constant_result
def _not_computed(*fields: Any) -> str:
    """The reason for a gate whose `GateForm` has these fields."""
    return f"its gate is {GateForm(*fields)}, which fp8moe does not compute"


def _weights(experts: Experts) -> tuple[str, str]:
    """The names of its parameters."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _why_not_its_weights(experts: Experts) -> str | None:
    names = _weights(experts)
    return _why_not_these(names, *(getattr(experts, name) for name in names))


def _why_not_these(names: tuple[str, str], *weights: Tensor) -> str | None:
    """The reasons that lie in its weights."""
    for name, weight in zip(names, weights, strict=True):
        if weight.dtype not in FLOAT_DTYPES:
            return f"{name} is {weight.dtype}; load the model unquantized, in bf16, fp16 or fp32"
        if weight.device.type not in (*DEVICE_TYPES, "meta"):
            return f"{name} is on {weight.device}; move the model to a CPU or CUDA device"
    return None


def _sizes(experts: Experts, down: Tensor) -> tuple[int, int]:
    """`H` and `I`, of this rank where tensor parallelism shards the weight. (FSDP gathers it for the forward.)"""
    if hasattr(down, "to_local") and not _is_managed_by_fsdp(experts):
        down = down.to_local()
    sizes = down.shape[1:]
    intermediate_size, hidden_size = sizes if experts.is_transposed else sizes[::-1]
    return hidden_size, intermediate_size


def _cache_of(experts: Experts, name: str, weight: Tensor) -> WeightCache | None:
    caches: dict[str, WeightCache] | None = getattr(experts, "_fp8moe_weight_caches", None)
    return None if caches is None or not _stays(experts, weight) else caches[name]


def _stays(experts: Experts, weight: Tensor) -> bool:
    """Whether the weight is the same tensor in each forward, so that there is something to keep."""
    is_plain = isinstance(weight, nn.Parameter) and not hasattr(weight, "to_local") and not weight.is_meta
    return is_plain and not _is_managed_by_fsdp(experts)


def _is_managed_by_fsdp(experts: Experts) -> bool:
    return getattr(experts, "_is_fsdp_managed_module", False)


register()
