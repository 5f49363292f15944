"""The module of `ep_moe_forward`: plain parameters, of this rank's experts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fp8moe.config import FP8Config
from fp8moe.distributed.exchange import exchange_of
from fp8moe.distributed.expert_parallel import Dispatch, Group, check_options, ep_moe_forward
from fp8moe.modules import SwiGLUExperts
from fp8moe.quantize.weight_cache import WeightCache


class ExpertParallelExperts(SwiGLUExperts):
    """`SwiGLUExperts` whose experts are on several ranks, the same number on each.

    Attributes:
        w_gate_up: parameter `(E, 2I, H)`, of this rank's `E` experts: rank `r` has those from `r * E` on; with
            `as_dtensors` that of all experts, of which this rank has its part.
        w_down: parameter `(E, H, I)`, likewise.
        dropped: int64 `()`: how many choices were left out for want of room since it was last zeroed. Read it when you
            please; that waits for the device.

    Args:
        num_experts: of all ranks together.
        hidden_size: `H`.
        intermediate_size: `I`.
        group: the ranks that share the experts, as in `ep_moe_forward`.
        dispatch, capacity, max_rows: as in `ep_moe_forward`.
        as_dtensors: make the parameters DTensors, `Shard(0)` over `group`, which must be a mesh then. Checkpoints can
            be loaded by any number of ranks, FSDP takes another dimension of the mesh, and norms are those of all
            experts.
        config, device, dtype, cache_weights: as in `SwiGLUExperts`.

    Raises:
        TypeError: `config`, `group`, `dispatch`, `capacity` or `max_rows` is not of its type, or `group` is no mesh
            with `as_dtensors`.
        ValueError: a size, `capacity` or `max_rows` is not positive, or `num_experts` is no multiple of the number of
            ranks.
    """

    dropped: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        group: Group,
        *,
        dispatch: Dispatch = Dispatch.FP8,
        capacity: int | None = None,
        max_rows: int | None = None,
        as_dtensors: bool = False,
        config: FP8Config | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_weights: bool = False,
    ) -> None:
        check_options(dispatch, capacity, max_rows)
        exchange = exchange_of(group)
        if as_dtensors and not isinstance(group, DeviceMesh):
            raise TypeError(
                f"as_dtensors needs a DeviceMesh of one dimension as group, and group is a {type(group).__name__}: "
                'pass one of torch.distributed.device_mesh.init_device_mesh, such as mesh["ep"]'
            )
        if num_experts < 1 or num_experts % exchange.num_ranks:
            raise ValueError(
                f"num_experts is {num_experts}; it must be a positive multiple of the number of ranks, "
                f"{exchange.num_ranks}: each has as many"
            )
        local = num_experts // exchange.num_ranks
        super().__init__(local, hidden_size, intermediate_size, config, device, dtype, cache_weights)
        self.exchange, self.dispatch, self.capacity, self.max_rows = exchange, dispatch, capacity, max_rows
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._ddp_params_and_buffers_to_ignore = ["dropped"]  # replicas in a DDP of their own count for themselves
        if isinstance(group, DeviceMesh) and as_dtensors:
            for name, parameter in [*self.named_parameters()]:
                shards = DTensor.from_local(parameter.detach(), group, [Shard(0)], run_check=False)
                self.register_parameter(name, nn.Parameter(shards))
            self._weight_caches = {
                name: WeightCache.of_parameter(self, f"_local_{name}") for name in self._weight_caches
            }

    def reset_parameters(self) -> None:
        """As in `SwiGLUExperts`. Seed the ranks differently, or they have the same experts."""
        for weight in (self._local_w_gate_up, self._local_w_down):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExpertParallelExperts":
        """What `to`, `to_empty` and the like do. Nothing has been counted on the meta device, and no checkpoint has
        `dropped`."""
        was_meta = self.dropped.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.dropped.is_meta:
            self.dropped.zero_()
        return self

    @property
    def _local_w_gate_up(self) -> Tensor:
        return _local(self.w_gate_up)

    @property
    def _local_w_down(self) -> Tensor:
        return _local(self.w_down)

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Send each token through its experts, wherever they are, and add up what they return.

        Args:
            hidden: `(T, H)`.
            topk_ids: integers `(T, k)`: the experts of each token, of all ranks. Any other id adds nothing.
            topk_weights: `(T, k)`: the router's weight of each choice.

        Returns:
            `(T, H)`, in the dtype of `hidden` or the autocast dtype.

        Raises:
            TypeError, ValueError: as `ep_moe_forward`.
        """
        return ep_moe_forward(
            hidden, topk_ids, topk_weights, self._local_w_gate_up, self._local_w_down, self.exchange,
            config=self.config, dispatch=self.dispatch, capacity=self.capacity, max_rows=self.max_rows,
            dropped=None if self.capacity is None else self.dropped,
            weight_caches=(self._cache_of("w_gate_up"), self._cache_of("w_down")),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_ranks={self.exchange.num_ranks}, dispatch={self.dispatch.name}" + (
            "" if self.capacity is None else f", capacity={self.capacity}, max_rows={self.max_rows}"
        )


def _local(weight: Tensor) -> Tensor:
    """What this rank has."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
