"""Modules to put in a model of one's own: plain parameters, plain `state_dict`."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8moe.autograd.grouped_mm import grouped_mm
from fp8moe.autograd.validate import FLOAT_DTYPES
from fp8moe.config import FP8Config, check_config
from fp8moe.operands import BLOCK
from fp8moe.weight_cache import WeightCache


class SwiGLUExperts(nn.Module):
    """The experts of a Mixture-of-Experts layer: `w_down @ (silu(w_gate @ x) * (w_up @ x))`, weighted, for each choice.

    Attributes:
        w_gate_up: parameter `(E, 2I, H)`, the gate's rows before the up-projection's.
        w_down: parameter `(E, H, I)`.

    Args:
        num_experts: `E`.
        hidden_size: `H`, a multiple of 128.
        intermediate_size: `I`, a multiple of 128.
        config: how the GEMMs compute; defaults to `FP8Config()`.
        device, dtype: of the parameters.
        cache_weights: keep the parameters in FP8 until they change (2 bytes an element); `WeightCache` says what it
            sees of a change; `invalidate_weight_cache` is for what it does not.

    Raises:
        TypeError: `config` is not an `FP8Config`.
        ValueError: a size is not positive, or not a multiple of 128.
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
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size <= 0 or size % BLOCK != 0:
                raise ValueError(f"{name} is {size}; it must be a positive multiple of {BLOCK}")
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
        self._check(hidden, topk_ids, topk_weights)
        num_tokens, num_choices = topk_ids.shape
        # Choices in the order of their experts; those of no expert last, past offs[-1], where rows come out as zeros.
        ids = topk_ids.long()
        ids = torch.where((ids >= 0) & (ids < self.num_experts), ids, self.num_experts).flatten()
        sorted_ids, order = ids.sort(stable=True)
        experts = torch.arange(self.num_experts, device=ids.device, dtype=ids.dtype)
        offs = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)

        permuted = hidden[order // num_choices]  # (T * k, H)
        gate, up = self.grouped_mm(permuted, self.w_gate_up, offs, "w_gate_up").chunk(2, dim=-1)  # (T * k, I) each
        # The router's weight scales the activation rather than the output: the combine is then a plain sum.
        weights = topk_weights.flatten()[order].to(gate.dtype)
        activation = F.silu(gate) * up * weights[:, None]
        outputs = self.grouped_mm(activation, self.w_down, offs, "w_down")  # (T * k, H)
        by_token = outputs[order.argsort()].view(num_tokens, num_choices, self.hidden_size)
        return by_token.sum(dim=1)

    def grouped_mm(self, a: Tensor, w: Tensor, offs: Tensor, name: str) -> Tensor:
        """`(M, K)` times `(E, N, K)`, the parameter `name`, for the groups that end at `offs`: the one place where this
        module multiplies."""
        cache = self._weight_caches.get(name)
        return grouped_mm(a, w.transpose(-2, -1), offs, config=self.config, weight_cache=cache)

    def invalidate_weight_cache(self) -> None:
        """Quantize the parameters again at their next use: after writes that nothing can see (`WeightCache`)."""
        for cache in self._weight_caches.values():
            cache.invalidate()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for cache in self._weight_caches.values():  # the parameters may have moved to another device
            cache.allocate()
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, config={self.config}, "
            f"cache_weights={bool(self._weight_caches)}"
        )

    def _check(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        named = (("hidden", hidden), ("topk_ids", topk_ids), ("topk_weights", topk_weights))
        for name, value in named:
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
            if value.device != self.w_down.device:
                raise ValueError(f"{name} is on {value.device} and the parameters on {self.w_down.device}: move one")
        for name, value in (*named[::2], ("w_gate_up", self.w_gate_up), ("w_down", self.w_down)):
            if value.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{name} has dtype {value.dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}"
                )
        if hidden.dim() != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}; it must be (T, {self.hidden_size})")
        if topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex or topk_ids.dtype is torch.bool:
            raise TypeError(f"topk_ids has dtype {topk_ids.dtype}; it must be an integer dtype: pass expert numbers")
        if topk_ids.dim() != 2 or topk_ids.shape[0] != hidden.shape[0]:
            raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}; it must be ({hidden.shape[0]}, k)")
        if topk_weights.shape != topk_ids.shape:
            shapes = f"{tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)}"
            raise ValueError(f"topk_weights has shape {shapes}; they must be equal")
