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
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.distributed.exchange import Exchange
from fp8moe.quantize.messages import Choices, Messages, pack
from fp8moe.rows.routing import Routing


@dataclass(frozen=True)
class Traffic:
    """The way there and the way back."""

    exchange: Exchange
    sent: Sequence[int]
    """Messages to each rank."""
    received: Sequence[int]
    """Messages from each rank."""
    may_be_empty: bool = False
    """Whether there are messages of no token, whose bytes nobody has written."""

    @property
    def num_slots(self) -> int:
        """`S`."""
        return sum(self.sent)

    def gradient_there(self, dout: Tensor, token_slot: Tensor, in_fp8: bool, *, clear: bool) -> Messages:
        """The gradient of the output, `(T, H)`, at the ranks of the experts, `N`; if `clear`, with zeros in messages of
        no token."""
        return self.there(pack(dout, token_slot, self.num_slots, in_fp8, clear=clear and self.may_be_empty))

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


@dataclass(eq=False)
class DispatchPlan:
    """The messages of forward, and where messages lie in forward and backward."""

    traffic: Traffic
    token_slot: Tensor
    """int32 `(T, k)`: the slot of each choice, -1 if it does not travel; of the choices that share one, at the first
    alone. Sums over it are sums over the ranks that a token was sent to."""
    choice_slot: Tensor
    """int32 `(T, k)`: the slot of each choice, or -1."""
    num_rows: int
    """How many choices the received messages bring to this rank's experts; if the host does not know, the most."""
    room: Room | None
    """None if everything travels."""
    messages: Messages | None
    """`S`, until they are sent."""

    def arrive(self) -> tuple[Messages, Tensor]:
        """Send the messages.

        Returns:
            What arrived, `N`; and int32 `(N, k)`: the experts that compute on it, -1 for none. What finds no room is
            left out, the last tokens of all ranks first.
        """
        messages, self.messages = self.messages, None
        arrived = self.traffic.there(cast(Messages, messages))
        ids = arrived.ids
        if self.room is None or self.room.max_rows is None:
            return arrived, ids
        chosen = (ids >= 0).view(-1, self.room.capacity, ids.shape[1]).transpose(0, 1)  # (capacity, P, k)
        number = chosen.flatten().cumsum(0).view(chosen.shape).transpose(0, 1).reshape(ids.shape)
        late = (ids >= 0) & (number > self.num_rows)
        self.room.count(late)
        return arrived, ids.masked_fill(late, -1)


def at_choices(sums: Tensor, choice_slot: Tensor) -> Tensor:
    """fp32 `(T, k)`: what came back for each choice, of `(S, k)`; zero for those that did not travel."""
    choice = torch.arange(choice_slot.shape[1], device=sums.device)
    return F.pad(sums, (0, 0, 0, 1))[choice_slot.long(), choice]  # -1 is the last row, of zeros


@dataclass(frozen=True, eq=False)
class _Ranks:
    """Which ranks the choices go to."""

    of_choices: Tensor
    """`(T, k)`: -1 where there is no such expert."""
    same: Tensor
    """bool `(T, k, k)`: which choices of a token go to one rank."""
    of_tokens: Tensor
    """`(T, k)`: the same, at the first choice of a token to a rank alone; else -1."""
    routing: Routing
    """Tokens to ranks: rows are messages, packed densely."""

    @classmethod
    def of(cls, topk_ids: Tensor, num_ranks: int, num_experts: int) -> "_Ranks":
        rank = topk_ids.long() // num_experts
        rank = rank.masked_fill((rank < 0) | (rank >= num_ranks), -1)
        same = rank[:, :, None] == rank[:, None, :]
        first = rank.masked_fill(same.tril(-1).any(2), -1)
        return cls(rank, same, first, Routing.from_topk(first, num_ranks))

    def slots_of_choices(self, token_slot: Tensor) -> Tensor:
        """int32 `(T, k)`: `token_slot` at all choices that share it."""
        return torch.where(self.same, token_slot[:, None, :], -1).amax(2)


def plan_dispatch(
    hidden: Tensor, choices: Choices, in_fp8: bool, exchange: Exchange, agreed: "Agreement"
) -> DispatchPlan:
    """Send every choice. The host reads how many messages go where, once, while the device packs them.

    Args:
        hidden: `(T, H)`.
        choices: of the tokens; an id that is not that of an expert stays here.
        in_fp8: in what features travel.
        exchange: the transport.
        agreed: what must be the same on all ranks.

    Raises:
        ValueError: it is not.
    """
    num_tokens, num_choices = choices.ids.shape
    num_ranks, device = exchange.num_ranks, hidden.device
    ranks = _Ranks.of(choices.ids, num_ranks, choices.num_experts)
    ends = ranks.routing.groups.ends
    messages_to = (ends - F.pad(ends, (1, -1))).long()
    rows_to = torch.zeros(num_ranks + 1, dtype=torch.int64, device=device)
    rows_to.scatter_add_(0, ranks.of_choices.flatten() + 1, torch.ones_like(ranks.of_choices).flatten())
    mine = torch.stack([messages_to, rows_to[1:], torch.full_like(messages_to, agreed.code)], dim=1)  # (P, 3)
    each = [1] * num_ranks
    numbers = _ToHost(torch.stack([mine, exchange.rows(mine, each, each)]))

    token_slot = ranks.routing.choice_row
    choice_slot = ranks.slots_of_choices(token_slot)
    messages = pack(hidden, token_slot, num_tokens * min(num_choices, num_ranks), in_fp8, choices)  # room for all
    sent, received = numbers.read()  # the host waits here
    agreed.check([code for _, _, code in received])
    traffic = Traffic(exchange, [count for count, _, _ in sent], [count for count, _, _ in received])
    messages = Messages(messages.data[: traffic.num_slots], messages.layout)
    return DispatchPlan(traffic, token_slot, choice_slot, sum(rows for _, rows, _ in received), None, messages)


def plan_dispatch_within(
    hidden: Tensor, choices: Choices, in_fp8: bool, exchange: Exchange, room: Room
) -> DispatchPlan:
    """Send what there is room for, the first tokens from each rank to each; the host reads nothing."""
    num_ranks, capacity = exchange.num_ranks, room.capacity
    ranks = _Ranks.of(choices.ids, num_ranks, choices.num_experts)
    dense = ranks.routing.choice_row
    place = dense - F.pad(ranks.routing.groups.ends, (1, -1))[ranks.of_tokens]  # among the messages to its rank
    travels = (dense >= 0) & (place < capacity)
    token_slot = torch.where(travels, ranks.of_tokens * capacity + place, -1).int()
    choice_slot = ranks.slots_of_choices(token_slot)
    room.count((choice_slot < 0) & (ranks.of_choices >= 0))

    sizes = [capacity] * num_ranks
    traffic = Traffic(exchange, sizes, sizes, may_be_empty=True)
    messages = pack(hidden, token_slot, traffic.num_slots, in_fp8, choices)
    num_rows = traffic.num_slots * choices.ids.shape[1]
    num_rows = num_rows if room.max_rows is None else min(num_rows, room.max_rows)
    return DispatchPlan(traffic, token_slot, choice_slot, num_rows, room, messages)


class _ToHost:
    """Numbers on their way to the host, which need not wait until all that the device does meanwhile is done."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[list[tuple[int, ...]]]:
        """The numbers, when they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


@dataclass(frozen=True)
class Agreement:
    """What must be the same on all ranks, or messages would have other sizes, or a rank would wait for ever."""

    hidden_size: int
    num_experts: int
    num_choices: int
    in_fp8: bool
    d_hidden: bool
    d_weights: bool
    backward: bool

    @property
    def code(self) -> int:
        """All in one number."""
        flags = self.in_fp8 | self.d_hidden << 1 | self.d_weights << 2 | self.backward << 3
        return self.hidden_size << 32 | self.num_experts << 16 | self.num_choices << 4 | flags

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
        f"H={code >> 32}, E={code >> 16 & 0xFFFF}, k={code >> 4 & 0xFFF}, dispatch={'FP8' if code & 1 else 'BF16'} and "
        f"gradients of {', '.join(wanted) or 'nothing'}"
    )
