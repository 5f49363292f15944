"""Whether an op runs in FP8 or in BF16, and which backend computes each of its GEMMs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_true

from fp8moe.config import FP8Config, KernelPreference
from fp8moe.gemm.base import BackendUnavailableError, Gemm, GroupedGemm, Missing
from fp8moe.gemm.cost import Costs, OpSize, OpSizes, device_microseconds
from fp8moe.gemm.deepgemm import DeepGemm
from fp8moe.gemm.deepgemm_probe import INSTALL
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm
from fp8moe.gemm.tuning import DecidingModel, deciding_model, override
from fp8moe.operands import BLOCK

BACKENDS: dict[KernelPreference, GroupedGemm] = {
    KernelPreference.DEEPGEMM: DeepGemm(),
    KernelPreference.TRITON: TritonGemm(),
    KernelPreference.EMULATED: Emulated(),
}
"""Every backend."""

FP8_PAYS_UP_TO = 0.97
"""AUTO takes FP8 if it is predicted to take at most this share of BF16's time. A prediction closer to 1 says nothing:
even and ragged groups of the same sizes differ by a few percent, and so do two measurements of one shape."""


@dataclass(frozen=True)
class Ranking:
    """The backends that AUTO tries for a GEMM in FP8, the fastest first."""

    backends: tuple[KernelPreference, ...]
    measured: str
    """Why in this order."""

    def __str__(self) -> str:
        return f"first of {', '.join(backend.name for backend in self.backends)} that can run here ({self.measured})"


_FASTEST_FIRST = (KernelPreference.TRITON, KernelPreference.DEEPGEMM)
_M_GROUPED = Ranking(
    _FASTEST_FIRST, "on an H200 TRITON beats DEEPGEMM, whose output rows must be unpadded, on every shape measured"
)
RANKINGS = {
    Gemm.FORWARD: _M_GROUPED,
    Gemm.DGRAD: _M_GROUPED,
    Gemm.WGRAD: Ranking(
        _FASTEST_FIRST,
        "on an H200 TRITON is 1.4x to 3.7x as fast as DEEPGEMM, whose fp32 product must be rounded; with a main_grad, "
        "which needs no rounding, TRITON takes 0.93 to 1.02 of DEEPGEMM's time for a whole op",
    ),
}
"""The ranking of each GEMM."""


GEMMS = (Gemm.FORWARD, Gemm.DGRAD, Gemm.WGRAD)
"""In the order of `Backends`. (Traces of torch 2.11 cannot iterate over an enum.)"""


class Backends(NamedTuple):
    """The backends of an op that runs in FP8."""

    forward: KernelPreference
    dgrad: KernelPreference
    wgrad: KernelPreference


@dataclass(frozen=True)
class Selected:
    """What computes one GEMM, and why."""

    backend: KernelPreference | None
    """None: BF16 `torch.nn.functional.grouped_mm`."""
    reason: str

    def __str__(self) -> str:
        return f"{'BF16 grouped_mm' if self.backend is None else self.backend.name}: {self.reason}"


Shape = tuple[int, int, int, int]
"""`(M, N, K, E)` of a product, `(M, H, I, E)` of a layer."""
_ALL_INTS = (int, int, int, int)


def backends_for(
    config: FP8Config, device: torch.device, shape: Shape,
    *, layer: bool = False, cached: bool = False, needs_wgrad: bool = True,
) -> Backends | None:  # fmt: skip
    """The backends that compute an op; None if it runs in BF16.

    Args:
        config: of the op.
        device: of its tensors.
        shape: of the op.
        layer: whether the op is a layer, not a single product.
        cached: whether every weight has a `WeightCache`.
        needs_wgrad: whether a weight gets a gradient. If none does, a backend need not be able to compute it.

    Raises:
        BackendUnavailableError: an explicit preference cannot be met.
        ValueError: sizes decide, and the file that `python -m fp8moe tune` wrote cannot be read.
    """
    if torch.compiler.is_compiling() or tuple(map(type, shape)) != _ALL_INTS:  # sizes may be symbols
        return _decide(config, device, shape, layer, cached, needs_wgrad)
    return _decide_once(
        config.kernel_preference,
        config.allow_bf16,
        config.keep_quantized_weights,
        device,
        shape,
        layer,
        cached,
        needs_wgrad,
        override(),
    )


@lru_cache(maxsize=4096)
def _decide_once(
    preference: KernelPreference, allow_bf16: bool, kept: bool, device: torch.device, shape: Shape,
    layer: bool, cached: bool, needs_wgrad: bool, _model: DecidingModel | None,
) -> Backends | None:  # fmt: skip
    """`_decide` for all that it depends on: eager code asks in every call, mostly for one of a few shapes."""
    config = FP8Config(kernel_preference=preference, allow_bf16=allow_bf16, keep_quantized_weights=kept)
    return _decide(config, device, shape, layer, cached, needs_wgrad)


def _decide(
    config: FP8Config, device: torch.device, shape: Shape, layer: bool, cached: bool, needs_wgrad: bool
) -> Backends | None:  # fmt: skip
    sizes = OpSizes.of_layer(*shape) if layer else OpSizes.of_product(*shape)
    names = _names_for_device(str(device), config.kernel_preference.value, config.allow_bf16)
    kept = config.keep_quantized_weights
    if not names or (sizes_decide(config, device) and not _fp8_pays_on(device, sizes, layer, cached, kept)):
        return None
    backends = Backends(*map(KernelPreference, names.split(",")))
    reasons = missing_for_sizes(backends if needs_wgrad else (*backends[:2], None), sizes)
    if not reasons:
        return backends
    if config.kernel_preference is not KernelPreference.AUTO:
        raise BackendUnavailableError(f"{config.kernel_preference} cannot compute this op: {_joined(reasons)}")
    return None if config.allow_bf16 else Backends(*[KernelPreference.EMULATED] * 3)


def token_tile_for(config: FP8Config, wgrad: KernelPreference, *, on_the_right: bool) -> int:
    """Tokens of an activation that share a scale in wgrad: what `config` names, else what is faster.

    Args:
        config: of the op.
        wgrad: the backend that computes it.
        on_the_right: whether the activation is the right side of the product, so that the gradient is made
            `(E, N, K)`. Long tiles are applied less often on that side alone.
    """
    if config.wgrad_token_tile is not None:
        return config.wgrad_token_tile
    return BACKENDS[wgrad].fastest_token_tile if on_the_right else BLOCK


def missing_for_sizes(backends: Sequence[KernelPreference | None], sizes: OpSizes) -> tuple[Missing, ...]:
    """All that keeps the backends of forward, dgrad and wgrad from computing an op of these sizes."""
    return tuple(
        missing
        for gemm, backend in zip(GEMMS, backends, strict=True)
        for n, k in sizes.features
        for missing in (() if backend is None else BACKENDS[backend].missing_for_sizes(gemm, n, k))
    )


def _joined(reasons: Sequence[Missing]) -> str:
    return " ".join(map(str, reasons))


def select_for_device(config: FP8Config, device: torch.device) -> dict[Gemm, Selected]:
    """The backend of each GEMM on `device`, for sizes for which FP8 pays. Either all are FP8 or all are BF16.

    Raises:
        BackendUnavailableError: an explicit preference cannot be met.
    """
    preference = config.kernel_preference
    if preference is not KernelPreference.AUTO:
        for gemm in Gemm:
            if missing := BACKENDS[preference].missing(gemm, device):
                message = f"{preference} cannot compute {gemm.value} on {device}: {_joined(missing)}"
                raise BackendUnavailableError(message)
        return dict.fromkeys(Gemm, Selected(preference, "requested"))
    if device.type != "cuda":
        reason = f"no FP8 tensor cores on device type {device.type!r}"
        return dict.fromkeys(Gemm, Selected(KernelPreference.EMULATED, reason))
    selected = {}
    for gemm, ranking in RANKINGS.items():
        usable = (backend for backend in ranking.backends if not BACKENDS[backend].missing(gemm, device))
        if (backend := next(usable, None)) is None:
            reason = "no FP8 backend can run here, and "
            if config.allow_bf16:
                return dict.fromkeys(Gemm, Selected(None, reason + "BF16 is never less accurate"))
            return dict.fromkeys(Gemm, Selected(KernelPreference.EMULATED, reason + "allow_bf16=False"))
        selected[gemm] = Selected(backend, str(ranking))
    return selected


def sizes_decide(config: FP8Config, device: torch.device) -> bool:
    """Whether the sizes of an op decide between FP8 and BF16, where FP8 can run."""
    return config.kernel_preference is KernelPreference.AUTO and config.allow_bf16 and device.type == "cuda"


def fp8_pays(costs: Costs, size: OpSize, cached: bool, padded: OpSize | None = None, *, kept: bool = False) -> bool:
    """Whether FP8 is predicted to be faster than BF16 by enough for AUTO to take it; in FP8 the op has the size
    `padded`, if that is given."""
    return _is_within_limit(*_fp8_and_limit(costs, cached, kept), size, size if padded is None else padded)


@torch.compiler.assume_constant_result
def _names_for_device(device: str, preference: str, allow_bf16: bool) -> str:
    """The values of the `KernelPreference`s of forward, dgrad and wgrad, joined by commas; empty for BF16.

    The result is a constant of a trace. A function of this kind must take and return plain values (as of torch 2.11).
    """
    return _names_for_device_once(device, preference, allow_bf16)


@lru_cache
def _names_for_device_once(device: str, preference: str, allow_bf16: bool) -> str:
    config = FP8Config(kernel_preference=KernelPreference(preference), allow_bf16=allow_bf16)
    backends = [selected.backend for selected in select_for_device(config, torch.device(device)).values()]
    is_auto = config.kernel_preference is KernelPreference.AUTO
    if is_auto and device.startswith("cuda") and KernelPreference.EMULATED in backends:
        warnings.warn(
            "fp8moe emulates FP8 on this GPU, slowly: no FP8 backend can run and FP8Config.allow_bf16 is False. "
            f"Install one: {INSTALL}",
            stacklevel=6,
        )
    return ",".join(backend.value for backend in backends if backend is not None)


def _fp8_pays_on(device: torch.device, sizes: OpSizes, layer: bool, cached: bool, kept: bool) -> bool:
    if not torch.compiler.is_compiling():
        return fp8_pays(deciding_model(device).model.costs(layer), sizes.exact, cached, sizes.padded, kept=kept)
    texts = _constant_coefficients(str(device), layer, cached, kept).split(";")
    fp8, limit = [[float(number) for number in text.split(",")] for text in texts]
    return _is_within_limit(fp8, limit, sizes.exact, sizes.padded)


@torch.compiler.assume_constant_result
def _constant_coefficients(device: str, layer: bool, cached: bool, kept: bool) -> str:
    """The result of `_fp8_and_limit` as a text, which is a plain value: see `_names_for_device`."""
    costs = deciding_model(torch.device(device)).model.costs(layer)
    return ";".join(",".join(map(repr, coefficients)) for coefficients in _fp8_and_limit(costs, cached, kept))


def _fp8_and_limit(costs: Costs, cached: bool, kept: bool) -> tuple[Sequence[float], Sequence[float]]:
    """The `Cost.coefficients` of FP8, and those of the longest that it may take."""
    limit = [FP8_PAYS_UP_TO * coefficient for coefficient in costs.bf16.coefficients]
    return costs.fp8_with(cached, kept).coefficients, limit


def _is_within_limit(fp8: Sequence[float], limit: Sequence[float], exact: OpSize, padded: OpSize) -> bool:
    """Whether the larger of FP8's times, on the host and on the device, is at most the larger of the limit's.

    In a trace, sizes may be symbols, and each comparison with one becomes a guard, as does each use of a global float.
    So this takes every number as an argument and compares single times: at most three comparisons have a symbol.
    Where only the device will know a size, as after an all-to-all, nothing can be compared, and FP8 is taken.
    """
    host, host_limit = fp8[-1], limit[-1]
    device, device_limit = device_microseconds(fp8, padded), device_microseconds(limit, exact)
    return (host <= host_limit or guard_or_true(host <= device_limit)) and (
        guard_or_true(device <= device_limit) or guard_or_true(device <= host_limit)
    )
