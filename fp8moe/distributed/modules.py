"""The module of `ep_moe_forward`: plain parameters, of this rank's experts."""

import torch
from torch import Tensor

from fp8moe.config import FP8Config
from fp8moe.distributed.exchange import exchange_of
from fp8moe.distributed.expert_parallel import Dispatch, Group, check_options, ep_moe_forward
from fp8moe.modules import SwiGLUExperts


class ExpertParallelExperts(SwiGLUExperts):
    """`SwiGLUExperts` whose experts are on several ranks, the same number on each.

    Attributes:
        w_gate_up: parameter `(E, 2I, H)`, of this rank's `E` experts: rank `r` has those from `r * E` on.
        w_down: parameter `(E, H, I)`.
        dropped: int64 `()`: how many choices were left out for want of room since it was last zeroed. Read it when you
            please; that waits for the device.

    Args:
        num_experts: of all ranks together.
        hidden_size: `H`.
        intermediate_size: `I`.
        group: the ranks that share the experts, as in `ep_moe_forward`.
        dispatch, capacity, max_rows: as in `ep_moe_forward`.
        config, device, dtype, cache_weights: as in `SwiGLUExperts`.

    Raises:
        TypeError: `config`, `group`, `dispatch`, `capacity` or `max_rows` is not of its type.
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
        config: FP8Config | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_weights: bool = False,
    ) -> None:
        check_options(dispatch, capacity, max_rows)
        exchange = exchange_of(group)
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
            hidden, topk_ids, topk_weights, self.w_gate_up, self.w_down, self.exchange, config=self.config,
            dispatch=self.dispatch, capacity=self.capacity, max_rows=self.max_rows,
            dropped=None if self.capacity is None else self.dropped,
            weight_caches=(self._cache_of("w_gate_up"), self._cache_of("w_down")),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_ranks={self.exchange.num_ranks}, dispatch={self.dispatch.name}" + (
            "" if self.capacity is None else f", capacity={self.capacity}, max_rows={self.max_rows}"
        )
