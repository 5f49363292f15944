"""What an op asks before it starts: who computes it, and in which dtype it answers."""

import torch
from torch import Tensor

from fp8moe.config import FP8Config, KernelPreference
from fp8moe.gemm.select import BF16, fp8_pays, selected_backends


def backends_for(config: FP8Config, device: torch.device, shape: tuple[int, int, int, int]) -> list[KernelPreference]:
    """Who computes forward, dgrad and wgrad of a product of this `(M, N, K, E)`; empty for BF16.

    Raises:
        BackendUnavailableError: an explicit preference cannot be met.
    """
    pays = True
    if config.kernel_preference is KernelPreference.AUTO and config.allow_bf16 and device.type == "cuda":
        # Only where it decides: under torch.compile a comparison of M becomes a guard (and a plain bool only by `if`).
        pays = True if fp8_pays(*shape) else False  # noqa: SIM210
    chosen = selected_backends(str(device), config.kernel_preference.value, config.allow_bf16, pays)
    return [] if chosen == BF16 else [KernelPreference(name) for name in chosen.split(",")]


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x`, under autocast the autocast dtype."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
