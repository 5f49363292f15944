"""Modules to put in a model of one's own: plain parameters, plain `state_dict`."""

import torch
from torch import Tensor, nn

from fp8moe.autograd.moe import moe_forward
from fp8moe.config import FP8Config, check_config
from fp8moe.quantize.weight_cache import WeightCache


class SwiGLUExperts(nn.Module):
    """The experts of a Mixture-of-Experts layer: `w_down @ (silu(w_gate @ x) * (w_up @ x))`, weighted, for each choice.

    Attributes:
        w_gate_up: parameter `(E, 2I, H)`, the gate's rows before the up-projection's.
        w_down: parameter `(E, H, I)`.

    Args:
        num_experts: `E`.
        hidden_size: `H`.
        intermediate_size: `I`.
        config: how the GEMMs compute; defaults to `FP8Config()`.
        device, dtype: of the parameters.
        cache_weights: keep the parameters in FP8 until they change (2 bytes an element); see `WeightCache`. Parameters
            that FSDP shards, or that a parametrization computes, are quantized in every forward and backward all the
            same (but see `fp8moe.distributed.gather_in_fp8`).

    Raises:
        TypeError: `config` is not an `FP8Config`.
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        config: FP8Config | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_weights: bool = False,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}; it must be at least 1")
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}; it must be at least 1")
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size is {intermediate_size}; it must be at least 1")
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.config = FP8Config() if config is None else config
        check_config(self.config)
        self.w_gate_up = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size, device=device, dtype=dtype)
        )
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, device=device, dtype=dtype))
        self.reset_parameters()
        names = ("w_gate_up", "w_down") if cache_weights else ()
        self._weight_caches = {name: WeightCache.of_parameter(self, name) for name in names}

    def reset_parameters(self) -> None:
        """Draw every expert as `nn.Linear` draws its weight: uniform within `1 / sqrt(fan_in)`."""
        for weight in (self.w_gate_up, self.w_down):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Send each token through its experts and add up what they return.

        Args:
            hidden: `(T, H)`.
            topk_ids: integers `(T, k)`: the experts of each token. An id outside `0..E-1` adds nothing (dropped).
            topk_weights: `(T, k)`: the router's weight of each choice.

        Returns:
            `(T, H)`, in the dtype of `hidden` or the autocast dtype.

        Raises:
            TypeError: an argument is not a tensor, or of the wrong dtype.
            ValueError: shapes or devices that do not fit each other.
        """
        return moe_forward(
            hidden,
            topk_ids,
            topk_weights,
            self.w_gate_up,
            self.w_down,
            config=self.config,
            weight_caches=(self._cache_of("w_gate_up"), self._cache_of("w_down")),
        )

    def _cache_of(self, name: str) -> WeightCache | None:
        """None for a weight that is made anew for each forward: computed by a parametrization, copied to a replica by
        DataParallel, or gathered by FSDP. It is quantized where it is used, and nothing is kept."""
        if name not in self._parameters or getattr(self, "_is_fsdp_managed_module", False):
            return None
        return self._weight_caches.get(name)

    def invalidate_weight_cache(self) -> None:
        """Quantize the parameters again at their next use. Call it after a write that `WeightCache` may miss."""
        for cache in self._weight_caches.values():
            cache.invalidate()

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, config={self.config}, "
            f"cache_weights={bool(self._weight_caches)}"
        )
