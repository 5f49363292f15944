"""The choice of a backend for each GEMM of an op, and the account of why."""

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch

from fp8moe.config import FP8Config, KernelPreference, check_config
from fp8moe.devices import compute_capability
from fp8moe.gemm.base import BackendUnavailableError, Gemm, GroupedGemm, Missing
from fp8moe.gemm.deepgemm import DeepGemm
from fp8moe.gemm.deepgemm_probe import INSTALL
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm

BACKENDS: dict[KernelPreference, GroupedGemm] = {
    KernelPreference.DEEPGEMM: DeepGemm(),
    KernelPreference.TRITON: TritonGemm(),
    KernelPreference.EMULATED: Emulated(),
}
"""What can be selected. The fast ones come first: AUTO takes the first that can compute a GEMM."""


FP8_PAYS_FROM_MULTIPLY_ADDS = 2e11
FP8_PAYS_FROM_ROWS_PER_EXPERT = 2048
_WHERE_FP8_PAYS = f"where M * N * K >= {FP8_PAYS_FROM_MULTIPLY_ADDS:.0e} and M >= {FP8_PAYS_FROM_ROWS_PER_EXPERT} * E"


@dataclass(frozen=True)
class Choice:
    """Who computes one GEMM, and why."""

    backend: KernelPreference | None
    """None: BF16 `torch.nn.functional.grouped_mm`."""
    reason: str

    def __str__(self) -> str:
        return f"{'BF16 grouped_mm' if self.backend is None else self.backend.name}: {self.reason}"


@dataclass(frozen=True)
class Explanation:
    """What `FP8Config` comes to on a device; `print` it."""

    device: str
    config: FP8Config
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
        lines.append("backends")
        for preference, lacks in self.lacks.items():
            lines.append(f"  {preference.name:<9}{'usable' if not lacks else 'not usable'}")
            lines += [f"    - {missing}" for missing in lacks]
        return "\n".join(lines)


def explain(
    device: torch.device | str | None = None,
    config: FP8Config | None = None,
    shape: tuple[int, int, int, int] | None = None,
) -> Explanation:
    """What will run on `device`, and why; what the other backends lack.

    Args:
        device: defaults to the current CUDA device if there is one, else the CPU.
        config: defaults to `FP8Config()`.
        shape: `(M, N, K, E)` of the product; without it, a product large enough for FP8 to pay is explained.

    Raises:
        TypeError: `config` is not an `FP8Config`.
        ValueError: `device` is not a CPU or CUDA device.
    """
    config = FP8Config() if config is None else config
    check_config(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be cpu or cuda")
    lacks: dict[KernelPreference, tuple[Missing, ...]] = {
        preference: tuple(dict.fromkeys(missing for gemm in Gemm for missing in _missing(preference, gemm, device)))
        for preference in KernelPreference
        if preference is not KernelPreference.AUTO
    }
    try:
        choices = choose(device, config.kernel_preference, config.allow_bf16, shape is None or fp8_pays(*shape))
    except BackendUnavailableError:
        choices = {}
    return Explanation(_describe(device), config, choices, lacks)


def fp8_pays(m: int, n: int, k: int, num_experts: int) -> bool:
    """Whether forward and backward of `(M, N, K, E)` are faster in FP8 than in BF16 on a Hopper GPU.

    A rule of thumb from an H200 with DeepGEMM, ragged groups: 1.06x to 1.23x of BF16's speed on the shapes above both
    bounds that were measured, 0.58x to 0.84x on those below one (README.md has the table). Quantization costs a time
    that grows with the operands, and with few rows an expert so does the fp32 weight gradient.
    """
    return m * n * k >= FP8_PAYS_FROM_MULTIPLY_ADDS and m >= FP8_PAYS_FROM_ROWS_PER_EXPERT * num_experts


def choose(device: torch.device, preference: KernelPreference, allow_bf16: bool, pays: bool) -> dict[Gemm, Choice]:
    """The backend of each GEMM.

    Args:
        device, preference, allow_bf16: as in `FP8Config`.
        pays: whether the product is large enough for FP8 to pay (`fp8_pays`).

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
    choices = {}
    for gemm in Gemm:
        for candidate in BACKENDS:
            if candidate is not KernelPreference.EMULATED and not _missing(candidate, gemm, device):
                choices[gemm] = Choice(candidate, f"the fastest that can run here, {_WHERE_FP8_PAYS}")
                break
    if len(choices) < len(Gemm):
        if allow_bf16:
            return dict.fromkeys(Gemm, Choice(None, "no FP8 backend can run here, and BF16 is never less accurate"))
        return dict.fromkeys(
            Gemm, Choice(KernelPreference.EMULATED, "no FP8 backend can run here, and allow_bf16=False")
        )
    if allow_bf16 and not pays:
        return dict.fromkeys(Gemm, Choice(None, f"FP8 is faster only {_WHERE_FP8_PAYS}"))
    return choices


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
