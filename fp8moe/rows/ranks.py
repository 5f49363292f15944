"""Which ranks a token travels to, and where its messages lie there.

A token that chose several experts of a rank travels there once: in the message of the first of these choices, which all
of them share. Shapes: `T` tokens, `k` choices a token, `P` ranks, `E` experts a rank. Rank `r` has the experts from
`r * E` on; an id outside `0..P*E-1` is that of no expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.torch_op import torch_op

MAX_RANKS_IN_KERNEL = 2048


def choose_ranks(topk_ids: Tensor, num_ranks: int, num_experts: int, code: int = 0) -> tuple[Tensor, Tensor]:
    """The rank of each choice, where it is the first choice of that rank.

    Args:
        topk_ids: integers `(T, k)`, any strides.
        num_ranks: `P`.
        num_experts: `E`.
        code: any number that all ranks are to know.

    Returns:
        int32 `(T, k)`: the rank, or -1 for the later choices of a rank and for those of no expert; and int64 `(P, 3)`:
        how many tokens and how many choices go to each rank, and the code.
    """
    first_rank, sent = _choose_ranks(topk_ids, num_ranks, num_experts, code)
    return first_rank, sent


def ranks_of(topk_ids: Tensor, num_ranks: int, num_experts: int) -> Tensor:
    """int64 `(T, k)`: the rank of each choice, -1 for those of no expert."""
    ids = topk_ids.long()
    return (ids // num_experts).masked_fill((ids < 0) | (ids >= num_ranks * num_experts), -1)


def _empty_ranks(topk_ids: Tensor, num_ranks: int, num_experts: int, code: int) -> list[Tensor]:
    first_rank = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    return [first_rank, torch.zeros((num_ranks, 3), dtype=torch.int64, device=topk_ids.device)]


@torch_op(fake=_empty_ranks, of_integers=True)
def _choose_ranks(topk_ids: Tensor, num_ranks: int, num_experts: int, code: int) -> list[Tensor]:
    if runs_triton(topk_ids.device) and num_ranks <= MAX_RANKS_IN_KERNEL:
        from fp8moe.kernels.ranks import launch_choose_ranks

        first_rank, sent = _empty_ranks(topk_ids, num_ranks, num_experts, code)
        launch_choose_ranks(topk_ids.contiguous(), num_ranks, num_experts, code, first_rank, sent)
        return [first_rank, sent]
    return choose_ranks_by_comparing(topk_ids, num_ranks, num_experts, code)


def choose_ranks_by_comparing(topk_ids: Tensor, num_ranks: int, num_experts: int, code: int) -> list[Tensor]:
    """`choose_ranks` in plain PyTorch: the definition."""
    rank = ranks_of(topk_ids, num_ranks, num_experts)
    again = (rank[:, :, None] == rank[:, None, :]).tril(-1).any(2)
    first_rank = rank.masked_fill(again, -1)
    counts = [_count(ranks + 1, num_ranks + 1)[1:] for ranks in (first_rank, rank)]
    return [first_rank.int(), torch.stack([*counts, torch.full_like(counts[0], code)], dim=1)]


def _count(x: Tensor, end: int) -> Tensor:
    """How many elements are 0, 1 ... `end - 1`. For `torch.bincount` the host waits for the device."""
    return x.new_zeros(end).scatter_add_(0, x.flatten(), torch.ones_like(x).flatten())


@torch_op(fake=lambda first_rank, dense_slot, ends, capacity: torch.empty_like(dense_slot), of_integers=True)
def slots_within(first_rank: Tensor, dense_slot: Tensor, ends: Tensor, capacity: int) -> Tensor:
    """Slots where there are `capacity` for each rank, full or not.

    Args:
        first_rank: of `choose_ranks`.
        dense_slot: int32 `(T, k)`: the message of each of these choices, those of a rank one after the other; or -1.
        ends: int32 `(P,)`: where the messages of each rank end among them.
        capacity: of a rank.

    Returns:
        int32 `(T, k)`: the slot, or -1 for the last of a rank that find no room.
    """
    if runs_triton(dense_slot.device):
        from fp8moe.kernels.ranks import launch_slots_within

        slots = torch.empty_like(dense_slot)
        launch_slots_within(first_rank, dense_slot, ends, capacity, slots)
        return slots
    place = dense_slot - F.pad(ends, (1, -1))[first_rank.long()]
    return torch.where((dense_slot >= 0) & (place < capacity), first_rank * capacity + place, -1)


def choice_places(
    topk_ids: Tensor, token_slot: Tensor, num_ranks: int, num_experts: int, dropped: Tensor | None = None
) -> Tensor:
    """Where each choice lies among all that come back: `slot * k + j` for choice `j` of a token.

    Args:
        topk_ids, num_ranks, num_experts: as in `choose_ranks`.
        token_slot: int32 `(T, k)`: the slot of each choice that is the first of its rank, or -1.
        dropped: int64 `()`: the number of choices of an expert that have no slot is added to it.

    Returns:
        int32 `(T, k)`, -1 for choices that do not travel.
    """
    return _choice_places(topk_ids, token_slot, num_ranks, num_experts, dropped)


@torch_op(
    fake=lambda topk_ids, token_slot, num_ranks, num_experts, dropped: torch.empty_like(token_slot),
    mutates_args=("dropped",), of_integers=True,
)  # fmt: skip
def _choice_places(
    topk_ids: Tensor, token_slot: Tensor, num_ranks: int, num_experts: int, dropped: Tensor | None
) -> Tensor:
    if runs_triton(topk_ids.device):
        from fp8moe.kernels.ranks import launch_choice_places

        places = torch.empty_like(token_slot)
        launch_choice_places(topk_ids.contiguous(), token_slot, num_ranks, num_experts, places, dropped)
        if dropped is not None:
            torch.autograd.graph.increment_version(dropped)
        return places
    return choice_places_by_comparing(topk_ids, token_slot, num_ranks, num_experts, dropped)


def choice_places_by_comparing(
    topk_ids: Tensor, token_slot: Tensor, num_ranks: int, num_experts: int, dropped: Tensor | None
) -> Tensor:
    """`choice_places` in plain PyTorch: the definition."""
    rank, num_choices = ranks_of(topk_ids, num_ranks, num_experts), topk_ids.shape[1]
    same = (rank[:, :, None] == rank[:, None, :]) & (rank >= 0)[:, :, None]
    slot = torch.where(same, token_slot[:, None, :], -1).amax(2)
    if dropped is not None:
        dropped += ((rank >= 0) & (slot < 0)).sum()
    return torch.where(slot < 0, -1, slot * num_choices + torch.arange(num_choices, device=slot.device)).int()
