"""fp8moe in torchtitan, by its overrides: no fork, and the parameters, their names and checkpoints stay as they are.

    --override.imports fp8moe.integrations.torchtitan.experts fp8moe.integrations.torchtitan.selective_ac

`experts` computes the whole expert MLP as one operation, `swiglu_experts`. `expert_parallel` does so too, and with
expert parallelism tokens travel to their experts in FP8. `grouped_mm` replaces the three products alone, and is for
classes of experts that compute the rest in their own way. `selective_ac` makes torchtitan's selective activation
checkpointing save what the grouped GEMMs of either return.

Options are those of `FP8Config`, and `strict`:

    --override.imports 'fp8moe.integrations.torchtitan.experts={"wgrad_token_tile": 128, "strict": true}'

Shapes: `R` rows that the dispatcher has grouped by expert, `T` tokens of this rank, `K` choices of each, `E` experts of
this rank, `D` hidden features (`H` in the rest of the package).

Raises:
    ImportError: torchtitan is missing, or of another version; the message says what to install.
"""

import warnings
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fp8moe.autograd.experts import swiglu_experts
from fp8moe.autograd.grouped_mm import grouped_mm as fp8_grouped_mm
from fp8moe.config import ActivationStorage, FP8Config, KernelPreference, ScaleFormat
from fp8moe.distributed import Dispatch, ep_moe_forward
from fp8moe.gemm.explain import explain
from fp8moe.integrations.report import ExpertsReport, Report, what_runs

try:
    import torchtitan

    if tuple(torchtitan.__version__.split(".")[:2]) != ("0", "3"):
        raise ImportError(f"found {torchtitan.__version__}")
    from torchtitan.config import derive, override
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
except ImportError as error:
    raise ImportError(
        f"fp8moe.integrations.torchtitan needs torchtitan 0.3 ({error}): pip install 'torchtitan==0.3.*'"
    ) from error

__all__ = ["GROUPED_GEMMS", "expert_parallel", "experts", "grouped_mm", "report", "selective_ac"]

FALLBACK = "torch._grouped_mm"
"""torchtitan's own way to compute experts."""

GROUPED_GEMMS = frozenset(
    {
        torch.ops.fp8moe.deepgemm_m_grouped.default,
        torch.ops.fp8moe.emulated_m_grouped.default,
        torch.ops.fp8moe.triton_m_grouped.default,
        torch.ops.fp8moe.m_grouped_bf16.default,
        torch.ops.fp8moe.m_grouped_cached.default,
        torch.ops.aten._grouped_mm.default,
    }
)
"""The operators whose results selective activation checkpointing should save: the grouped GEMMs of a forward, those of
experts that torchtitan computes itself included. A `SelectiveAC` of your own can add them in its `get_save_ops`."""

ENUMS = {"kernel_preference": KernelPreference, "scale_format": ScaleFormat, "activation_storage": ActivationStorage}

ExpertsConfig: TypeAlias = Any
"""A `GroupedExperts.Config`, or that of a class derived from `GroupedExperts`."""


@override(target=GroupedExperts.Config, description="fp8moe: each layer's experts as one operation, in FP8")
def experts(cfg: ExpertsConfig, *, strict: bool = False, **options: Any) -> ExpertsConfig:
    """Each layer's experts as one operation, in FP8.

    Args:
        cfg: of the experts.
        strict: raise `ValueError` for experts that fp8moe cannot compute. By default torchtitan computes them, and a
            warning says why, once for each class.
        options: fields of `FP8Config`, enums by their values: `kernel_preference="triton"`.

    Raises:
        TypeError: an option is unknown, or its value is not of the right type.
        ValueError: the value of an option is not valid, or `strict`, and the experts cannot be computed.
    """
    _fp8_config(options)
    reason = _why_not_as_one_operation(cfg)
    if reason is not None:
        _refuse(type(cfg)._owner, reason, strict)
        return cfg
    return derive(cfg, FP8GroupedExperts.Config, fp8_options=options, strict=strict)


@override(
    target=RoutedExperts.Config, description="fp8moe: each layer's experts as one operation, to which tokens go in FP8"
)
def expert_parallel(cfg: Any, *, strict: bool = False, dispatch: str = "fp8", **options: Any) -> Any:
    """`experts`, and tokens that go to the experts of other ranks in FP8, each once to a rank.

    In the place of `experts`, not beside it. Without expert parallelism it does the same. Compiled layers
    (`--compile.enable`) cannot have it: torchtitan compiles them as one graph each, and this is none.

    Args:
        cfg: of experts and their dispatcher, which must be torchtitan's own all-to-all (`comm_backend="standard"`).
        strict, options: as in `experts`.
        dispatch: "fp8", or "bf16"; see `fp8moe.distributed.Dispatch`.

    Raises:
        TypeError, ValueError: as `experts`, and for `dispatch`.
    """
    values = [kind.value for kind in Dispatch]
    if dispatch not in values:
        raise ValueError(f"dispatch is {dispatch!r}; it must be one of {', '.join(values)}")
    _fp8_config(options)
    inner, kind = cfg.inner_experts, type(cfg.token_dispatcher)
    reason = _why_not_as_one_operation(inner)
    if reason is None and kind not in (AllToAllTokenDispatcher.Config, LocalTokenDispatcher.Config):
        reason = (
            f"its tokens travel by {kind._owner.__name__}: choose the standard comm_backend, or the override experts"
        )
    if reason is not None:
        _refuse(type(inner)._owner, reason, strict)
        return cfg
    of_rank = derive(inner, FP8GroupedExperts.Config, fp8_options=options, strict=strict)
    return derive(cfg, FP8RoutedExperts.Config, inner_experts=of_rank, dispatch=dispatch)


@override(target=GroupedExperts.Config, description="fp8moe: the grouped products of the experts in FP8")
def grouped_mm(cfg: ExpertsConfig, *, strict: bool = False, **options: Any) -> ExpertsConfig:
    """The grouped products of the experts in FP8, and nothing else: also for classes that `experts` refuses.

    Arguments and errors are those of `experts`.
    """
    _fp8_config(options)
    reason = _why_not_its_products(cfg)
    if reason is not None:
        _refuse(type(cfg)._owner, reason, strict)
        return cfg
    return derive(cfg, _with_fp8_grouped_mm(type(cfg)._owner).Config, fp8_options=options, strict=strict)


@override(target=SelectiveAC.Config, exact=True, description="fp8moe: also save what the grouped GEMMs return")
def selective_ac(cfg: Any) -> Any:
    """Selective activation checkpointing that also saves what the grouped GEMMs return.

    torchtitan's own list names neither fp8moe's operators nor `torch._grouped_mm`: without this, backward computes each
    of them once more.
    """
    return derive(cfg, FP8SelectiveAC.Config)


class FP8GroupedExperts(GroupedExperts):
    """torchtitan's experts as one operation: `w2 @ (silu(w1 @ x) * (w3 @ x))`, all GEMMs in FP8."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        fp8_options: dict[str, Any] = field(default_factory=dict)
        """Fields of `FP8Config` as plain values, which torchtitan can write to a file."""
        strict: bool = False
        """As it was asked for; the override has met it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.fp8_config = _fp8_config(config.fp8_options)

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Rows `(R, D)` and how many of them each expert has, `(E,)`; `(R, D)` of the dtype of `x_RD`.

        There may be more rows than that, where a dispatcher leaves room: these come out as zeros.
        """
        offs = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        return swiglu_experts(x_RD, *self.weights, offs, config=self.fp8_config).type_as(x_RD)

    @property
    def weights(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Of this rank: `(w_gate, w_up)`, `(E, I, D)` each, and `w_down` `(E, D, I)`."""
        gate, up, down = (_local(weight) for weight in (self.w1_EFD, self.w3_EFD, self.w2_EDF))
        return (gate, up), down


class FP8RoutedExperts(RoutedExperts):
    """torchtitan's experts and their dispatcher as one operation, `ep_moe_forward`, where ranks share the experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        dispatch: str = Dispatch.FP8.value

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dispatch = Dispatch(config.dispatch)

    @property
    def ep_mesh(self) -> DeviceMesh | None:
        """The ranks that share the experts, if any do."""
        return getattr(self.token_dispatcher, "ep_mesh", None)

    def forward(
        self, x_BLD: Tensor, topk_scores_BLK: Tensor, topk_expert_ids_BLK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> Tensor:
        """Tokens `(B, L, D)`, scores and ids of all experts `(B, L, K)`; `(B, L, D)` of the dtype of `x_BLD`."""
        if self.ep_mesh is None:
            return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)
        x_TD, scores_TK, ids_TK = (x.flatten(0, 1) for x in (x_BLD, topk_scores_BLK, topk_expert_ids_BLK))
        experts = self.inner_experts
        out_TD = ep_moe_forward(
            x_TD, ids_TK, scores_TK, *experts.weights, self.ep_mesh, dispatch=self.dispatch, config=experts.fp8_config
        )
        return out_TD.type_as(x_BLD).view_as(x_BLD)


@cache
def _with_fp8_grouped_mm(parent: Any) -> Any:
    """The class of experts `parent` with its products in FP8."""

    class FP8GroupedMM(parent):
        @dataclass(kw_only=True, slots=True)
        class Config(parent.Config):
            fp8_options: dict[str, Any] = field(default_factory=dict)
            strict: bool = False

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.fp8_config = _fp8_config(config.fp8_options)

        def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
            """`A` `(R, K)`, `B_t` `(E, K, N)`, `offs` int32 `(E,)`; `(R, N)`."""
            return fp8_grouped_mm(A, B_t, offs, config=self.fp8_config)

    FP8GroupedMM.__name__ = FP8GroupedMM.__qualname__ = f"FP8GroupedMM{parent.__name__}"
    FP8GroupedMM.Config.__qualname__ = f"{FP8GroupedMM.__qualname__}.Config"  # which torchtitan logs
    return FP8GroupedMM


class FP8SelectiveAC(SelectiveAC):
    """torchtitan's selective activation checkpointing, which also saves what the grouped GEMMs return."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        return super().get_save_ops() | GROUPED_GEMMS


def report(model: nn.Module, tokens: int | None = None, experts_per_token: int | None = None) -> Report:
    """What will run each experts module of `model`, and why.

    Args:
        model: any model; its `GroupedExperts` are looked at.
        tokens: how many tokens a forward has on this rank. On Hopper `KernelPreference.AUTO` decides by it between FP8
            and BF16; without it the report leaves that open.
        experts_per_token: `k`; defaults to that of the token dispatcher beside the experts.

    Raises:
        ValueError: `tokens` is given, and `k` is neither given nor known from a dispatcher.
    """
    routed = {module.inner_experts: module for module in model.modules() if isinstance(module, RoutedExperts)}
    entries = []
    for name, module in model.named_modules():
        if isinstance(module, GroupedExperts):
            parent = routed.get(module)
            k = experts_per_token or getattr(getattr(parent, "token_dispatcher", None), "top_k", None)
            if tokens is not None and k is None:
                raise ValueError(f"{type(module).__name__} has no token dispatcher beside it: pass experts_per_token")
            name = name.replace(_CHECKPOINT_PREFIX, "")  # as in a state dict
            dispatch = parent.dispatch if isinstance(parent, FP8RoutedExperts) and parent.ep_mesh is not None else None
            entries.append(_report_of(name, module, None if tokens is None or k is None else tokens * k, dispatch))
    return Report(tuple(entries), "the model has no GroupedExperts of torchtitan")


def _report_of(name: str, module: Any, rows: int | None, dispatch: Dispatch | None) -> ExpertsReport:
    kind, weights = type(module).__name__, [weight for weight in module.parameters() if weight.dim() == 3]
    config: FP8Config | None = getattr(module, "fp8_config", None)
    if config is None:
        fix = "no override of fp8moe has replaced it: pass --override.imports fp8moe.integrations.torchtitan.experts"
        return ExpertsReport(name, kind, FALLBACK, fix)
    shapes = [_local_shape(weight) for weight in weights]
    device = None if weights[0].device.type == "meta" else weights[0].device
    if isinstance(module, FP8GroupedExperts):
        num_experts, hidden, intermediate = _local_shape(module.w2_EDF)
        layer = None if rows is None else (rows, 1, hidden, intermediate, num_experts)
        if dispatch is Dispatch.FP8:
            config = replace(config, allow_bf16=False)
        runs, why = what_runs(explain(device, config, layer=layer), rows is not None)
        travel = "" if dispatch is None else f"; tokens travel to their ranks in {dispatch.name}"
        return ExpertsReport(name, kind, runs, why + travel)
    products = [None if rows is None else (rows, n, k, num_experts) for num_experts, n, k in shapes]  # (M, N, K, E)
    found = dict.fromkeys(what_runs(explain(device, config, product), rows is not None) for product in products)
    return ExpertsReport(name, kind, *(" / ".join(texts) for texts in zip(*found, strict=True)))


def _fp8_config(options: dict[str, Any]) -> FP8Config:
    """The `FP8Config` of options as a command line gives them."""
    names = [field.name for field in fields(FP8Config)]
    for name in options:
        if name not in names:
            raise TypeError(f"{name} is no option of this override; it takes strict, {', '.join(names)}")
    values = dict(options)
    for name, kind in ENUMS.items():
        if values.get(name) in [member.value for member in kind]:
            values[name] = kind(values[name])
    return FP8Config(**values)


def _why_not_as_one_operation(cfg: ExpertsConfig) -> str | None:
    reason = _why_not_its_products(cfg)
    if reason is None and type(cfg) is not GroupedExperts.Config:
        return "it computes its experts in its own way; fp8moe.integrations.torchtitan.grouped_mm replaces the products"
    return reason


def _why_not_its_products(cfg: ExpertsConfig) -> str | None:
    kind = type(cfg)._owner
    if any(parent.__module__.startswith("torchtitan.components.quantization") for parent in kind.__mro__):
        return "a converter of torchtitan quantizes these experts: remove it from the model's converters"
    if kind._grouped_mm is not GroupedExperts._grouped_mm:
        return "it has grouped products of its own (_grouped_mm)"
    return None


_warned: set[str] = set()


def _refuse(kind: type[Any], reason: str, strict: bool) -> None:
    if strict:
        raise ValueError(f"fp8moe cannot compute {kind.__name__}: {reason}")
    _warn_once(kind.__name__, reason)


def _warn_once(kind: str, reason: str) -> None:
    """Once for each class."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"fp8moe cannot compute {kind}, {FALLBACK} does: {reason}", stacklevel=4)


def _local(weight: Tensor) -> Tensor:
    """What this rank holds where expert or tensor parallelism shards the weight. (FSDP gathers it for the forward.)"""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _local_shape(weight: Any) -> tuple[int, ...]:
    """The shape of `_local(weight)` in a forward, from outside of it: FSDP shards the weight there."""
    shape = list(weight.shape)
    for dim, placement in enumerate(getattr(weight, "placements", ())):
        if weight.device_mesh.mesh_dim_names[dim] in ("ep", "tp") and placement.is_shard():
            shape[placement.dim] //= weight.device_mesh.size(dim)
    return tuple(shape)
