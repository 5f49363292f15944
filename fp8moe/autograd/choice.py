"""What an op asks before it starts: who computes it, and in which dtype it answers."""

import torch
from torch import Tensor

from fp8moe.config import FP8Config, KernelPreference
from fp8moe.gemm.cost import Work, is_within
from fp8moe.gemm.select import BF16, compared_coefficients, is_decided_by_cost, selected_backends
from fp8moe.gemm.tuning import deciding_model


def backends_for(
    config: FP8Config,
    device: torch.device,
    sizes: tuple[int, int, int, int],
    *,
    layer: bool = False,
    cached: bool = False,
) -> list[KernelPreference]:
    """Who computes forward, dgrad and wgrad of an op; empty for BF16.

    Args:
        config: of the op.
        device: of its tensors.
        sizes: `(M, N, K, E)` of a product, `(M, H, I, E)` of a layer, `M` the rows of all experts.
        layer: whether it is a layer.
        cached: whether every weight has a `WeightCache`.

    Raises:
        BackendUnavailableError: an explicit preference cannot be met.
        ValueError: AUTO is to decide, and the file that `python -m fp8moe tune` wrote cannot be read.
    """
    pays = True
    if is_decided_by_cost(device, config):
        work = Work.of_layer(*sizes) if layer else Work.of_product(*sizes)
        pays = _fp8_pays(device, work, layer, cached)
    chosen = selected_backends(str(device), config.kernel_preference.value, config.allow_bf16, pays)
    return [] if chosen == BF16 else [KernelPreference(name) for name in chosen.split(",")]


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x`, under autocast the autocast dtype."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _fp8_pays(device: torch.device, work: Work, layer: bool, cached: bool) -> bool:
    """Asked only where it decides: under torch.compile a comparison of `M` becomes a guard."""
    if not torch.compiler.is_compiling():
        return deciding_model(device).model.costs(layer).fp8_pays(work, cached)
    takes, may_take = compared_coefficients(str(device), layer, cached).split(";")
    return is_within([float(text) for text in takes.split(",")], [float(text) for text in may_take.split(",")], work)
