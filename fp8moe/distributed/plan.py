"""Which token goes to which rank, and where its messages lie. All of it is computed on the device. The host reads once,
or, with a capacity, never.

A token that chose several experts of a rank travels there once. What it carries beside its features is, for each of its
`k` choices, the number of the expert on that rank (-1 for choices elsewhere) and its weight: there, the tokens that
arrived are to their rank's experts what any tokens are to their experts.

Shapes: `T` tokens, `k` choices a token, `P` ranks, `E` experts a rank, `S` slots (messages that this rank sends), `N`
messages that it receives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.distributed.exchange import Exchange
from fp8moe.quantize.messages import MessageLayout, Messages, pack


@dataclass(frozen=True)
class Traffic:
    """The way there and the way back."""

    exchange: Exchange
    sent: Sequence[int]
    """Messages to each rank."""
    received: Sequence[int]
    """Messages from each rank."""

    def there(self, messages: Messages) -> Messages:
        """From the ranks of the tokens, `S`, to those of the experts, `N`."""
        return Messages(self.exchange.rows(messages.data, self.sent, self.received), messages.layout)

    def back(self, x: Tensor) -> Tensor:
        """From the ranks of the experts `(N, D)` to those of the tokens `(S, D)`."""
        return self.exchange.rows(x, self.received, self.sent)


@dataclass(frozen=True, eq=False)
class Room:
    """What there is room for, where the host is to read nothing."""

    capacity: int
    """Tokens from one rank to another."""
    max_rows: int | None
    """Rows of a rank's experts; None is room for any choices of what arrives."""
    dropped: Tensor | None
    """int64 `()`: what found no room is counted here, in choices."""

    def count(self, dropped: Tensor) -> None:
        """Count those of `dropped`, bool of any shape."""
        if self.dropped is not None:
            self.dropped.add_(dropped.sum())


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Where messages lie."""

    traffic: Traffic
    token_slot: Tensor
    """int32 `(T, k)`: the slot of each choice, -1 if it does not travel; of the choices that share one, at the first
    alone. Sums over it are sums over the ranks that a token was sent to."""
    choice_slot: Tensor
    """int32 `(T, k)`: the slot of each choice, or -1."""
    slot_token: Tensor
    """int64 `(S,)`: the token of each slot; `T` if it is empty."""
    slot_ids: Tensor
    """int32 `(S, k)`: for each choice of the token, the number of the expert on the slot's rank, or -1."""
    num_rows: int
    """How many choices the received messages bring to this rank's experts; if the host does not know, the most."""
    room: Room | None
    """None if everything travels."""

    def messages(self, x: Tensor, layout: MessageLayout, weights: Tensor | None = None) -> Messages:
        """What to send of `x` `(T, H)`, and of `weights` `(T, k)` if the layout has choices."""
        messages = pack(x, self.token_slot, len(self.slot_token), layout)
        if weights is not None:
            messages.ids.copy_(self.slot_ids)
            messages.weights.copy_(F.pad(weights, (0, 0, 0, 1))[self.slot_token])
        return messages

    def expert_ids(self, arrived: Messages) -> Tensor:
        """int32 `(N, k)`: the experts that compute on what arrived, -1 for none. What finds no room is left out, the
        last tokens of all ranks first."""
        ids = arrived.ids
        if self.room is None or self.room.max_rows is None:
            return ids
        chosen = (ids >= 0).view(-1, self.room.capacity, ids.shape[1]).transpose(0, 1)  # (capacity, P, k)
        number = chosen.flatten().cumsum(0).view(chosen.shape).transpose(0, 1).reshape(ids.shape)
        late = (ids >= 0) & (number > self.num_rows)
        self.room.count(late)
        return ids.masked_fill(late, -1)


def at_choices(sums: Tensor, choice_slot: Tensor) -> Tensor:
    """fp32 `(T, k)`: what came back for each choice, of `(S, k)`; zero for those that did not travel."""
    choice = torch.arange(choice_slot.shape[1], device=sums.device)
    return F.pad(sums, (0, 0, 0, 1))[choice_slot.long(), choice]  # -1 is the last row, of zeros


@dataclass(frozen=True, eq=False)
class _Choices:
    """Which rank each choice goes to."""

    valid: Tensor
    """bool `(T, k)`: whether its expert exists."""
    rank: Tensor
    """int64 `(T, k)`: the rank of its expert; `P` if there is none."""
    is_first: Tensor
    """bool `(T, k)`: whether it is the first of its token to its rank."""
    before: Tensor
    """int64 `(T, k)`: how many earlier tokens go to its rank."""
    tokens: Tensor
    """int64 `(P,)`: how many go to each rank."""
    count: Tensor
    """int64 `(P,)`: of each rank."""


def _choices(topk_ids: Tensor, num_ranks: int, num_experts: int) -> _Choices:
    ids = topk_ids.long()
    valid = (ids >= 0) & (ids < num_ranks * num_experts)
    rank = torch.where(valid, ids // num_experts, num_ranks)
    same = rank[:, :, None] == rank[:, None, :]  # (T, k, k)
    goes = torch.zeros((len(ids), num_ranks + 1), dtype=torch.int64, device=ids.device).scatter_(1, rank, 1)  # (T, P+1)
    before = (goes.cumsum(0) - goes).gather(1, rank)
    count = torch.zeros(num_ranks + 1, dtype=torch.int64, device=ids.device)
    count.scatter_add_(0, rank.flatten(), torch.ones_like(rank).flatten())
    return _Choices(valid, rank, valid & ~same.tril(-1).any(2), before, goes.sum(0)[:-1], count[:-1])


def plan_dispatch(topk_ids: Tensor, num_experts: int, exchange: Exchange, agreed: "Agreement") -> DispatchPlan:
    """Send every choice. The host reads how many messages go where, once.

    Args:
        topk_ids: integers `(T, k)`, of all ranks' experts; any that is not that of an expert stays here.
        num_experts: `E`.
        exchange: the transport.
        agreed: what must be the same on all ranks.

    Raises:
        ValueError: it is not.
    """
    choices = _choices(topk_ids, exchange.num_ranks, num_experts)
    mine = torch.stack([choices.tokens, choices.count, torch.full_like(choices.count, agreed.code)], dim=1)  # (P, 3)
    each = [1] * exchange.num_ranks
    sent, received = torch.stack([mine, exchange.rows(mine, each, each)]).tolist()  # the host waits here
    agreed.check([code for _, _, code in received])
    traffic = Traffic(exchange, [tokens for tokens, _, _ in sent], [tokens for tokens, _, _ in received])
    ends = choices.tokens.cumsum(0)
    num_rows = sum(count for _, count, _ in received)
    return _plan(topk_ids, num_experts, choices, choices.valid, ends - choices.tokens, ends, traffic, num_rows)


def plan_dispatch_within(topk_ids: Tensor, num_experts: int, exchange: Exchange, room: Room) -> DispatchPlan:
    """Send what there is room for, the first tokens from each rank to each; the host reads nothing."""
    num_ranks, capacity = exchange.num_ranks, room.capacity
    choices = _choices(topk_ids, num_ranks, num_experts)
    travels = choices.valid & (choices.before < capacity)
    starts = torch.arange(num_ranks, device=topk_ids.device) * capacity
    sizes = [capacity] * num_ranks
    traffic = Traffic(exchange, sizes, sizes)
    room.count(choices.valid & ~travels)
    num_rows = num_ranks * capacity * topk_ids.shape[1]
    num_rows = num_rows if room.max_rows is None else min(num_rows, room.max_rows)
    return _plan(topk_ids, num_experts, choices, travels, starts, starts + capacity, traffic, num_rows, room)


def _plan(
    topk_ids: Tensor, num_experts: int, choices: _Choices, travels: Tensor, starts: Tensor, ends: Tensor,
    traffic: Traffic, num_rows: int, room: Room | None = None,
) -> DispatchPlan:  # fmt: skip
    """Where the slots of each rank start and end, `(P,)`, decides all the rest."""
    (num_tokens, num_choices), num_slots, device = topk_ids.shape, sum(traffic.sent), topk_ids.device
    choice_slot = torch.where(travels, F.pad(starts, (0, 1))[choices.rank] + choices.before, -1)
    token_slot = choice_slot.masked_fill(~choices.is_first, -1)

    token = torch.arange(num_tokens, device=device)[:, None].expand(-1, num_choices)
    slot_token = torch.full((num_slots + 1,), num_tokens, device=device)
    at = token_slot.masked_fill(token_slot < 0, num_slots)
    slot_token = slot_token.scatter_(0, at.flatten(), token.flatten())[:-1]

    rank = torch.bucketize(torch.arange(num_slots, device=device), ends, right=True)
    ids = F.pad(topk_ids.long(), (0, 0, 0, 1), value=-1)[slot_token] - (rank * num_experts)[:, None]
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), -1)
    return DispatchPlan(traffic, token_slot.int(), choice_slot.int(), slot_token, ids.int(), num_rows, room)


@dataclass(frozen=True)
class Agreement:
    """What must be the same on all ranks, or messages would have other sizes, or a rank would wait for ever."""

    hidden_size: int
    num_choices: int
    in_fp8: bool
    d_hidden: bool
    d_weights: bool
    backward: bool

    @property
    def code(self) -> int:
        """All in one number."""
        flags = self.in_fp8 | self.d_hidden << 1 | self.d_weights << 2 | self.backward << 3
        return self.hidden_size << 24 | self.num_choices << 4 | flags

    def check(self, codes: Sequence[int]) -> None:
        """Compare with those of the other ranks.

        Raises:
            ValueError: one differs.
        """
        for rank, code in enumerate(codes):
            if code != self.code:
                raise ValueError(
                    f"rank {rank} of the group calls ep_moe_forward with {_words(code)}, this rank with "
                    f"{_words(self.code)}: all ranks must call it alike"
                )


def _words(code: int) -> str:
    wanted = [name for bit, name in ((1, "hidden"), (2, "topk_weights"), (3, "the output")) if code >> bit & 1]
    return (
        f"H={code >> 24}, k={code >> 4 & 0xFFFFF}, dispatch={'FP8' if code & 1 else 'BF16'} and gradients of "
        f"{', '.join(wanted) or 'nothing'}"
    )
