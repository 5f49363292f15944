"""The choice of a backend for each GEMM of an op, and the account of why."""

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch

from fp8moe.config import FP8Config, KernelPreference, check_config
from fp8moe.devices import compute_capability
from fp8moe.gemm.base import BackendUnavailableError, Gemm, GroupedGemm, Missing
from fp8moe.gemm.cost import FP8_PAYS_UP_TO, Cost, CostModel, Costs, Work
from fp8moe.gemm.deepgemm import DeepGemm
from fp8moe.gemm.deepgemm_probe import INSTALL
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm
from fp8moe.gemm.tuning import DecidingModel, deciding_model

BACKENDS: dict[KernelPreference, GroupedGemm] = {
    KernelPreference.DEEPGEMM: DeepGemm(),
    KernelPreference.TRITON: TritonGemm(),
    KernelPreference.EMULATED: Emulated(),
}
"""What can be selected."""


@dataclass(frozen=True)
class Ranking:
    """Who may compute a GEMM where AUTO takes FP8: the first that can."""

    backends: tuple[KernelPreference, ...]
    measured: str
    """Why in this order."""

    def __str__(self) -> str:
        return f"first of {', '.join(backend.name for backend in self.backends)} that can run here ({self.measured})"


_M_GROUPED = Ranking(
    (KernelPreference.TRITON, KernelPreference.DEEPGEMM),
    "on an H200 TRITON beats DEEPGEMM, which has rows to unpad, on every shape measured",
)
RANKINGS = {
    Gemm.FORWARD: _M_GROUPED,
    Gemm.DGRAD: _M_GROUPED,
    Gemm.WGRAD: Ranking(
        (KernelPreference.TRITON, KernelPreference.DEEPGEMM),
        "on an H200 TRITON is 1.4x to 3.7x as fast as DEEPGEMM, which has an fp32 product to round; with a main_grad, "
        "where it has none, a whole op takes 0.93 to 1.02 of its time with DEEPGEMM",
    ),
}
"""For each GEMM."""


@dataclass(frozen=True)
class Choice:
    """Who computes one GEMM, and why."""

    backend: KernelPreference | None
    """None: BF16 `torch.nn.functional.grouped_mm`."""
    reason: str

    def __str__(self) -> str:
        return f"{'BF16 grouped_mm' if self.backend is None else self.backend.name}: {self.reason}"


@dataclass(frozen=True)
class Prediction:
    """How long forward and backward of an op take in eager code, in microseconds."""

    what: str
    costs: Costs
    work: Work
    cached: bool
    """Whether every weight has a `WeightCache`."""

    @property
    def bf16_us(self) -> float:
        """In BF16."""
        return self.costs.bf16.predict_us(self.work)

    @property
    def fp8_us(self) -> float:
        """In FP8."""
        return self.costs.fp8_with(self.cached).predict_us(self.work)

    @property
    def fp8_pays(self) -> bool:
        """Whether AUTO takes FP8."""
        return self.costs.fp8_pays(self.work, self.cached)

    def __str__(self) -> str:
        bf16, fp8 = self._told(self.costs.bf16), self._told(self.costs.fp8_with(self.cached))
        return f"{self.what}, forward and backward: BF16 {bf16}, FP8 {fp8}"

    def _told(self, cost: Cost) -> str:
        device_us = cost.predict_device_us(self.work)
        told = f"{cost.predict_us(self.work):.0f} us"
        return f"{told} (to launch it; the device takes {device_us:.0f} us)" if device_us < cost.host else told


@dataclass(frozen=True)
class Explanation:
    """What `FP8Config` comes to on a device; `print` it."""

    device: str
    config: FP8Config
    decider: DecidingModel | None
    """What chooses between FP8 and BF16; None where nothing is to choose."""
    prediction: Prediction | None
    """What it predicts; None where no sizes were given."""
    choices: dict[Gemm, Choice]
    """Empty if an explicit preference cannot be met: the op then raises `BackendUnavailableError`."""
    lacks: dict[KernelPreference, tuple[Missing, ...]]
    """For each backend, what keeps it from computing some GEMM here; empty if it can compute all."""

    def __str__(self) -> str:
        lines = [f"fp8moe on {self.device}, KernelPreference.{self.config.kernel_preference.name}"]
        if self.choices:
            lines += [f"  {gemm.value:<8} {choice}" for gemm, choice in self.choices.items()]
        else:
            lines.append("  cannot run: an explicit preference never falls back")
        if self.decider is not None:
            lines.append(f"cost model: {self.decider}")
        if self.prediction is not None:
            lines.append(f"  {self.prediction}")
        lines.append("backends")
        for preference, lacks in self.lacks.items():
            lines.append(f"  {preference.name:<9}{'usable' if not lacks else 'not usable'}")
            lines += [f"    - {missing}" for missing in lacks]
        return "\n".join(lines)


def explain(
    device: torch.device | str | None = None,
    config: FP8Config | None = None,
    shape: tuple[int, int, int, int] | None = None,
    *,
    layer: tuple[int, int, int, int, int] | None = None,
    weight_cache: bool = False,
) -> Explanation:
    """What will run on `device`, and why; what the other backends lack.

    Args:
        device: defaults to the current CUDA device if there is one, else the CPU.
        config: defaults to `FP8Config()`.
        shape: `(M, N, K, E)` of a `grouped_mm`.
        layer: `(T, k, H, I, E)` of a `moe_forward`; of a `swiglu_experts` the rows and 1 for `T` and `k`. Without
            `shape` and `layer`, sizes for which FP8 pays are explained.
        weight_cache: whether every weight has a `WeightCache`.

    Raises:
        TypeError: `config` is not an `FP8Config`.
        ValueError: `device` is not a CPU or CUDA device, `shape` and `layer` are both given, or the file that
            `python -m fp8moe tune` wrote cannot be read.
    """
    config = FP8Config() if config is None else config
    check_config(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be cpu or cuda")
    if shape is not None and layer is not None:
        raise ValueError(f"shape is {shape} and layer is {layer}; give one of them: what is explained is one op")
    lacks: dict[KernelPreference, tuple[Missing, ...]] = {
        preference: tuple(dict.fromkeys(missing for gemm in Gemm for missing in _missing(preference, gemm, device)))
        for preference in KernelPreference
        if preference is not KernelPreference.AUTO
    }
    decider = prediction = None
    if is_decided_by_cost(device, config) and _fastest(device) is not None:
        decider = deciding_model(device)
        prediction = _predict(decider.model, shape, layer, weight_cache)
    pays = prediction is None or prediction.fp8_pays
    try:
        choices = choose(device, config.kernel_preference, config.allow_bf16, pays)
    except BackendUnavailableError:
        choices = {}
    return Explanation(_describe(device), config, decider, prediction, choices, lacks)


def is_decided_by_cost(device: torch.device, config: FP8Config) -> bool:
    """Whether sizes may decide between FP8 and BF16."""
    return config.kernel_preference is KernelPreference.AUTO and config.allow_bf16 and device.type == "cuda"


@torch.compiler.assume_constant_result
def compared_coefficients(device: str, layer: bool, cached: bool) -> str:
    """What `Costs.compared` returns, joined by commas, and both by a semicolon.

    They are constants of a trace, while sizes need not be; a text for the reason that `selected_backends` gives.

    Args:
        device: a CUDA device.
        layer: whether the work is that of a whole layer.
        cached: whether every weight has a `WeightCache`.

    Raises:
        ValueError: the tuned file cannot be read.
    """
    costs = deciding_model(torch.device(device)).model.costs(layer)
    return ";".join(",".join(map(repr, coefficients)) for coefficients in costs.compared(cached))


def choose(device: torch.device, preference: KernelPreference, allow_bf16: bool, pays: bool) -> dict[Gemm, Choice]:
    """The backend of each GEMM.

    Args:
        device, preference, allow_bf16: as in `FP8Config`.
        pays: whether FP8 is predicted to be faster than BF16, by enough.

    Raises:
        BackendUnavailableError: an explicit preference cannot be met.
    """
    if preference is not KernelPreference.AUTO:
        lacks = {gemm: _missing(preference, gemm, device) for gemm in Gemm}
        for gemm, missing in lacks.items():
            if missing:
                reasons = " ".join(map(str, missing))
                raise BackendUnavailableError(f"{preference} cannot compute {gemm.value} on {device}: {reasons}")
        return dict.fromkeys(Gemm, Choice(preference, "requested"))
    if device.type != "cuda":
        return dict.fromkeys(
            Gemm, Choice(KernelPreference.EMULATED, f"no FP8 tensor cores on device type {device.type!r}")
        )
    choices = _fastest(device)
    if choices is None:
        if allow_bf16:
            return dict.fromkeys(Gemm, Choice(None, "no FP8 backend can run here, and BF16 is never less accurate"))
        return dict.fromkeys(
            Gemm, Choice(KernelPreference.EMULATED, "no FP8 backend can run here, and allow_bf16=False")
        )
    if allow_bf16 and not pays:
        gain = f"{1 - FP8_PAYS_UP_TO:.0%}"
        return dict.fromkeys(Gemm, Choice(None, f"FP8 is not predicted to take {gain} less time for these sizes"))
    return choices


def _fastest(device: torch.device) -> dict[Gemm, Choice] | None:
    """For each GEMM the first of its ranking that can run; None if one can be run by none."""
    choices = {}
    for gemm in Gemm:
        ranking = RANKINGS[gemm]
        usable = (backend for backend in ranking.backends if not _missing(backend, gemm, device))
        if (backend := next(usable, None)) is None:
            return None
        choices[gemm] = Choice(backend, str(ranking))
    return choices


def _predict(
    model: CostModel,
    shape: tuple[int, int, int, int] | None,
    layer: tuple[int, int, int, int, int] | None,
    cached: bool,
) -> Prediction | None:
    if layer is not None:
        tokens, choices, *features = layer
        what, work = f"layer (T, k, H, I, E) = {layer}", Work.of_layer(tokens * choices, *features)
    elif shape is not None:
        what, work = f"grouped_mm (M, N, K, E) = {shape}", Work.of_product(*shape)
    else:
        return None
    what += ", weights cached" if cached else ""
    return Prediction(what, model.costs(layer is not None), work, cached)


BF16 = "bf16"


@torch.compiler.assume_constant_result
def selected_backends(device: str, preference: str, allow_bf16: bool, pays: bool) -> str:
    """The values of the `KernelPreference`s that compute forward, dgrad and wgrad, joined by commas, or `BF16`.

    Arguments and result are plain, because those are what `torch.compile` (from 2.11 on) takes for constants. Warns
    where AUTO is left with the emulation on a GPU (once: the result is cached).

    Raises:
        BackendUnavailableError: an explicit preference cannot be met.
    """
    return _selected_backends(device, preference, allow_bf16, pays)


@lru_cache
def _selected_backends(device: str, preference: str, allow_bf16: bool, pays: bool) -> str:
    choices = choose(torch.device(device), KernelPreference(preference), allow_bf16, pays)
    chosen = [choices[gemm].backend for gemm in (Gemm.FORWARD, Gemm.DGRAD, Gemm.WGRAD)]
    if preference == KernelPreference.AUTO.value and device.startswith("cuda") and KernelPreference.EMULATED in chosen:
        warnings.warn(
            "fp8moe emulates FP8 on this GPU, slowly: no FP8 backend can run and FP8Config.allow_bf16 is False. "
            f"Install one: {INSTALL}",
            stacklevel=4,
        )
    return BF16 if None in chosen else ",".join(backend.value for backend in chosen if backend is not None)


def _missing(preference: KernelPreference, gemm: Gemm, device: torch.device) -> tuple[Missing, ...]:
    return BACKENDS[preference].missing(gemm, device)


def _describe(device: torch.device) -> str:
    capability = compute_capability(device)
    if capability is None:
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{capability[0]}{capability[1]})"
