"""Which token goes to which rank, and where its messages lie. All of it is computed on the device. The host reads once,
or, with a capacity, never.

A token that chose several experts of a rank travels there once. What it carries beside its features is, for each of its
`k` choices, the number of the expert on that rank (-1 for choices elsewhere) and its weight: there, the tokens that
arrived are to their rank's experts what any tokens are to their experts.

Shapes: `T` tokens, `k` choices a token, `P` ranks, `E` experts a rank, `S` slots (messages that this rank sends), `N`
messages that it receives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.devices import is_being_captured
from fp8moe.distributed.exchange import Arrival, Exchange
from fp8moe.quantize.messages import Choices, MessageLayout, Messages, pack
from fp8moe.rows.groups import check_num_rows
from fp8moe.rows.ranks import choice_places, choose_ranks, slots_within
from fp8moe.rows.routing import route_choices


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

    def send_gradient(self, dout: Tensor, token_slot: Tensor, in_fp8: bool, *, clear: bool) -> "ArrivingMessages":
        """The gradient of the output, `(T, H)`, to the ranks of the experts, `N`; if `clear`, with zeros in messages of
        no token."""
        return self.there(pack(dout, token_slot, self.num_slots, in_fp8, clear=clear and self.may_be_empty))

    def there(self, messages: Messages) -> "ArrivingMessages":
        """From the ranks of the tokens, `S`, to those of the experts, `N`."""
        return ArrivingMessages(self.exchange.send(messages.data, self.sent, self.received), messages.layout)

    def back(self, messages: Messages) -> "ArrivingMessages":
        """From the ranks of the experts, `N`, to those of the tokens, `S`."""
        return ArrivingMessages(self.exchange.send(messages.data, self.received, self.sent), messages.layout)

    def rows_back(self, x: Tensor) -> Arrival:
        """From the ranks of the experts `(N, D)` to those of the tokens `(S, D)`."""
        return self.exchange.send(x, self.received, self.sent)


@dataclass(eq=False)
class ArrivingMessages:
    """Messages on their way to this rank."""

    _arrival: Arrival
    layout: MessageLayout
    _arrived: Messages | None = None

    def wait(self) -> Messages:
        """The messages, when the current stream has them."""
        if self._arrived is None:
            self._arrived = Messages(self._arrival.wait(), self.layout)
        return self._arrived


@dataclass(frozen=True, eq=False)
class Room:
    """What there is room for, where the host is to read nothing."""

    capacity: int
    """Tokens from one rank to another."""
    max_rows: int | None
    """Rows of a rank's experts; None is room for any choices of what arrives."""
    dropped: Tensor | None
    """int64 `()`: what found no room is counted here, in choices."""


@dataclass(eq=False)
class DispatchPlan:
    """Messages that have left, and where messages lie in forward and backward."""

    traffic: Traffic
    token_slot: Tensor
    """int32 `(T, k)`: the slot of each choice, -1 if it does not travel; of the choices that share one, at the first
    alone. Sums over it are sums over the ranks that a token was sent to."""
    choice_place: Tensor
    """int32 `(T, k)`: `slot * k + j` for choice `j`, or -1: where its number is among those that come back."""
    num_rows: int
    """How many choices the received messages bring to this rank's experts; if the host does not know, the most."""
    room: Room | None
    """None if everything travels."""
    arriving: ArrivingMessages
    """`N`."""

    def arrive(self) -> tuple[Messages, Tensor]:
        """What arrived, `N`; and int32 `(N, k)`: the experts that compute on it, -1 for none. What finds no room is
        left out, the last tokens of all ranks first."""
        arrived = self.arriving.wait()
        ids = arrived.ids
        if self.room is None or self.room.max_rows is None:
            return arrived, ids
        chosen = (ids >= 0).view(-1, self.room.capacity, ids.shape[1]).transpose(0, 1)  # (capacity, P, k)
        number = chosen.flatten().cumsum(0).view(chosen.shape).transpose(0, 1).reshape(ids.shape)
        late = (ids >= 0) & (number > self.num_rows)
        if self.room.dropped is not None:
            self.room.dropped.add_(late.sum())
        return arrived, ids.masked_fill(late, -1)


Departure = Callable[[], DispatchPlan]
"""Lets packed messages leave, once, and keeps none of them. What is computed before that hides behind the host's wait
for their number; it hides nothing of their way."""


def pack_all(hidden: Tensor, choices: Choices, in_fp8: bool, exchange: Exchange, agreed: "Agreement") -> Departure:
    """Send every choice. The host reads how many messages go where, once, when they leave.

    Args:
        hidden: `(T, H)`.
        choices: of the tokens; an id that is not that of an expert stays here.
        in_fp8: in what features travel.
        exchange: the transport.
        agreed: what must be the same on all ranks; leaving raises ValueError if it is not.

    Raises:
        RuntimeError: a CUDA graph is being captured.
        ValueError: there may be more messages than can be numbered.
    """
    if is_being_captured(hidden):
        raise RuntimeError(
            "ep_moe_forward is called while a CUDA graph is captured, and has no capacity: then the host waits for the "
            "device, which a graph cannot; pass capacity"
        )
    ids, num_experts, num_ranks = choices.ids, choices.num_experts, exchange.num_ranks
    num_tokens, num_choices = ids.shape
    all_slots = num_tokens * min(num_choices, num_ranks)
    check_num_rows(all_slots * num_choices, num_experts)
    first_rank, mine = choose_ranks(ids, num_ranks, num_experts, agreed.code)
    each = [1] * num_ranks
    theirs = exchange.send(mine, each, each)
    _, token_slot = route_choices(first_rank, num_ranks)
    choice_place = choice_places(ids, token_slot, num_ranks, num_experts)
    numbers = _ToHost(mine, theirs.wait())
    waiting = [pack(hidden, token_slot, all_slots, in_fp8, choices, all_used=True)]

    def depart() -> DispatchPlan:
        sent, received = numbers.read()  # the host waits here
        agreed.check([code for _, _, code in received])
        traffic = Traffic(exchange, [count for count, _, _ in sent], [count for count, _, _ in received])
        packed = waiting.pop()
        arriving = traffic.there(Messages(packed.data[: traffic.num_slots], packed.layout))
        return DispatchPlan(traffic, token_slot, choice_place, sum(rows for _, rows, _ in received), None, arriving)

    return depart


def pack_within(hidden: Tensor, choices: Choices, in_fp8: bool, exchange: Exchange, room: Room) -> Departure:
    """Send what there is room for, the first tokens from each rank to each; the host reads nothing."""
    ids, num_experts, num_ranks = choices.ids, choices.num_experts, exchange.num_ranks
    sizes, num_choices = [room.capacity] * num_ranks, ids.shape[1]
    traffic = Traffic(exchange, sizes, sizes, may_be_empty=True)
    num_rows = traffic.num_slots * num_choices
    check_num_rows(num_rows, num_experts)
    first_rank, _ = choose_ranks(ids, num_ranks, num_experts)
    ends, dense_slot = route_choices(first_rank, num_ranks)
    token_slot = slots_within(first_rank, dense_slot, ends, room.capacity)
    choice_place = choice_places(ids, token_slot, num_ranks, num_experts, room.dropped)
    waiting = [pack(hidden, token_slot, traffic.num_slots, in_fp8, choices)]
    num_rows = num_rows if room.max_rows is None else min(num_rows, room.max_rows)
    return lambda: DispatchPlan(traffic, token_slot, choice_place, num_rows, room, traffic.there(waiting.pop()))


class _ToHost:
    """Numbers on their way to the host, which need not wait until all that the device does meanwhile is done."""

    def __init__(self, *numbers: Tensor) -> None:
        shape, on_gpu, self._arrived = (len(numbers), *numbers[0].shape), numbers[0].is_cuda, None
        self._numbers = torch.empty(shape, dtype=numbers[0].dtype, pin_memory=on_gpu)
        for there, here in zip(self._numbers, numbers, strict=True):
            there.copy_(here, non_blocking=True)
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers[0].device))

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
