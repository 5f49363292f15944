"""Routing: from the router's choices to the rows that the experts compute on, and back, without leaving the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.operands import TokenGroups
from fp8moe.rows.groups import MAX_GROUPS_IN_KERNEL, check_num_rows, plan_by_bucketize
from fp8moe.torch_op import torch_op


@dataclass(frozen=True, eq=False)
class Routing:
    """Which row each choice of an expert becomes, and which token and choice each padded row came from.

    `T` tokens of `k` choices each make `M = T * k` ragged rows: the choices in the order of their experts, those of one
    expert in the order of the tokens. A choice of no expert (dropped, or another rank's) is skipped: it has no row. As
    many ragged rows as there are skipped choices lie at the end, past `groups.ends[-1]`, and belong to no choice. As in
    `TokenGroups`, shapes depend on `T`, `k` and `E` alone, and nothing here reads the device.
    """

    groups: TokenGroups
    """The plan of the ragged rows, `M` of them, and of the padded rows."""
    row_token: Tensor
    """int32 `(R,)`: the token that each padded row copies; -1 on padding and past the last group. In the place of
    `groups.row_source` it makes quantization gather the rows straight from the tokens `(T, H)`."""
    choice_row: Tensor
    """int32 `(T, k)`: the ragged row of each choice; -1 if skipped."""
    row_weights: Tensor | None = None
    """`(M,)`: the weight of each ragged row's choice; unspecified for rows of no choice. None if there are none."""

    @property
    def tensors(self) -> list[Tensor]:
        """The routing as a flat list: `Routing.from_tensors(tensors)` is the same routing."""
        weights = [] if self.row_weights is None else [self.row_weights]
        return [*self.groups.tensors, self.row_token, self.choice_row, *weights]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Routing":
        """The routing that has these `tensors`."""
        plan, (row_token, choice_row, *weights) = tensors[:5], tensors[5:]
        return cls(TokenGroups(choice_row.numel(), *plan), row_token, choice_row, *weights)

    @classmethod
    def from_topk(cls, topk_ids: Tensor, num_experts: int, topk_weights: Tensor | None = None) -> "Routing":
        """Route every token to the experts that it chose.

        Args:
            topk_ids: integers `(T, k)`, any strides, `k >= 1`: the experts of each token. An id outside `0..E-1` is
                skipped. A token may choose an expert more than once: each choice is a row.
            num_experts: `E`, at least 1.
            topk_weights: any dtype `(T, k)`: becomes `row_weights`, without its gradient.

        Raises:
            ValueError: there are too many choices for an int32. Raised when the operator runs.
        """
        weights = None if topk_weights is None else topk_weights.detach()
        return cls.from_tensors(_route(topk_ids, weights, num_experts))

    def first_rows(self, num_rows: int) -> "Routing":
        """The same routing where no more than the first `num_rows` ragged rows belong to choices: without room for the
        others. Its tensors are views."""
        groups, capacity = self.groups, TokenGroups.capacity_for(num_rows, self.groups.num_groups)
        groups = TokenGroups(
            num_rows, groups.ends, groups.padded_ends, groups.row_expert[:capacity], groups.row_source[:capacity],
            groups.token_row[:num_rows],
        )  # fmt: skip
        weights = None if self.row_weights is None else self.row_weights[:num_rows]
        return Routing(groups, self.row_token[:capacity], self.choice_row, weights)


def route_by_sort(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> list[Tensor]:
    """The tensors of `Routing` in plain PyTorch: the definition."""
    num_choices, choices_per_token = topk_ids.numel(), topk_ids.shape[1]
    ids = topk_ids.flatten().long()
    skipped = (ids < 0) | (ids >= num_experts)
    sorted_ids, order = ids.masked_fill(skipped, num_experts).sort(stable=True)
    experts = torch.arange(num_experts, device=ids.device)
    offs = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    groups = TokenGroups(num_choices, *plan_by_bucketize(offs, num_choices))

    order = order.int()  # the choice of each ragged row
    padding = groups.row_source < 0
    row_token = (order[groups.row_source.clamp(min=0)] // choices_per_token).masked_fill(padding, -1)
    choice_row = order.argsort().int().masked_fill(skipped, -1).view(topk_ids.shape)
    weights = [] if topk_weights is None else [topk_weights.flatten()[order]]
    return [*groups.tensors, row_token, choice_row, *weights]


def _empty_routing(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> list[Tensor]:
    num_choices = topk_ids.numel()
    capacity = TokenGroups.capacity_for(num_choices, num_experts)
    sizes = [num_experts, num_experts, capacity, capacity, num_choices, capacity]
    shapes = [*((size,) for size in sizes), topk_ids.shape]
    device = topk_ids.device
    routing = [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]
    if topk_weights is not None:
        routing.append(torch.empty(num_choices, dtype=topk_weights.dtype, device=device))
    return routing


@torch_op(fake=_empty_routing, of_integers=True)  # and of weights without their gradients
def _route(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> list[Tensor]:
    check_num_rows(topk_ids.numel(), num_experts)
    if runs_triton(topk_ids.device) and num_experts <= MAX_GROUPS_IN_KERNEL:
        from fp8moe.kernels.routing import launch_route

        routing = _empty_routing(topk_ids, topk_weights, num_experts)
        weights = None if topk_weights is None else _with_contiguous_choices(topk_weights)
        launch_route(_with_contiguous_choices(topk_ids), weights, num_experts, routing)
        return routing
    return route_by_sort(topk_ids, topk_weights, num_experts)


def _with_contiguous_choices(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def route_choices(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`groups.ends` and `choice_row` of `Routing.from_topk` alone, which raises the same: for rows without padding."""
    ends, choice_row = _route_choices(topk_ids, num_experts)
    return ends, choice_row


def _empty_choices(topk_ids: Tensor, num_experts: int) -> list[Tensor]:
    device = topk_ids.device
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    return [ends, torch.empty(topk_ids.shape, dtype=torch.int32, device=device)]


@torch_op(fake=_empty_choices, of_integers=True)
def _route_choices(topk_ids: Tensor, num_experts: int) -> list[Tensor]:
    check_num_rows(topk_ids.numel(), num_experts)
    if runs_triton(topk_ids.device) and num_experts <= MAX_GROUPS_IN_KERNEL:
        from fp8moe.kernels.routing import launch_route_choices

        ends, choice_row = _empty_choices(topk_ids, num_experts)
        launch_route_choices(_with_contiguous_choices(topk_ids), num_experts, ends, choice_row)
        return [ends, choice_row]
    ends, *_, choice_row = route_by_sort(topk_ids, None, num_experts)
    return [ends, choice_row]
