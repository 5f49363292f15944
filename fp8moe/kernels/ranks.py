"""Kernels: which ranks a token travels to, and where its messages lie there."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from

CHOICES_OF_A_PROGRAM = 512
MIN_BINS = 128  # of a histogram: a thread each


@triton.jit
def ranks_of(topk_ids, choice, inside, NUM_RANKS, NUM_EXPERTS):
    """int32: the rank of each choice's expert; -1 where there is none, and outside."""
    ids = tl.load(topk_ids + choice, mask=inside, other=0).to(tl.int64)  # before it is compared in a narrow type
    is_expert = inside & (ids >= 0) & (ids < NUM_RANKS * NUM_EXPERTS)  # a narrow type may have no other id
    return tl.where(is_expert, ids // NUM_EXPERTS, -1).to(tl.int32)


@triton.jit
def choose_ranks_kernel(
    topk_ids,  # integers (T, CHOICES) contiguous
    first_rank,  # int32 (T, CHOICES)
    sent,  # int64 (NUM_RANKS, 3), zeros
    code, T, NUM_RANKS, NUM_EXPERTS,
    CHOICES: tl.constexpr, PADDED_CHOICES: tl.constexpr, TOKENS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """`choose_ranks` of TOKENS tokens. BINS is at least NUM_RANKS."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    choice = tl.arange(0, PADDED_CHOICES)
    inside = (token < T)[:, None] & (choice < CHOICES)[None, :]
    places = token[:, None] * CHOICES + choice[None, :]
    rank = ranks_of(topk_ids, places, inside, NUM_RANKS, NUM_EXPERTS)
    first = rank
    for number in range(CHOICES):
        earlier = ranks_of(topk_ids, token * CHOICES + number, token < T, NUM_RANKS, NUM_EXPERTS)
        first = tl.where((choice > number)[None, :] & (rank == earlier[:, None]), -1, first)
    tl.store(first_rank + places, first, mask=inside)
    bins = tl.arange(0, BINS)
    messages = tl.reshape(first, (TOKENS * PADDED_CHOICES,))
    rows = tl.reshape(rank, (TOKENS * PADDED_CHOICES,))
    num_messages = tl.histogram(messages, BINS, mask=messages >= 0).to(tl.int64)
    num_rows = tl.histogram(rows, BINS, mask=rows >= 0).to(tl.int64)
    # Integers: in whatever order they are added, the sum is the same.
    tl.atomic_add(sent + bins * 3, num_messages, mask=bins < NUM_RANKS)
    tl.atomic_add(sent + bins * 3 + 1, num_rows, mask=bins < NUM_RANKS)
    if tl.program_id(0) == 0:
        tl.store(sent + bins * 3 + 2, tl.zeros((BINS,), tl.int64) + code, mask=bins < NUM_RANKS)


def launch_choose_ranks(
    topk_ids: Tensor, num_ranks: int, num_experts: int, code: int, first_rank: Tensor, sent: Tensor
) -> None:
    """Fill `first_rank` and `sent`, as in the kernel; `num_experts` is of a rank."""
    num_tokens, choices = topk_ids.shape
    padded = power_of_2_from(choices)
    tokens = max(1, CHOICES_OF_A_PROGRAM // padded)
    # At least one program, which writes the code.
    launch(
        choose_ranks_kernel, max(ceil_div(num_tokens, tokens), 1),
        topk_ids, first_rank, sent, code, num_tokens, num_ranks, num_experts,
        CHOICES=choices, PADDED_CHOICES=padded, TOKENS=tokens, BINS=max(power_of_2_from(num_ranks), MIN_BINS),
        num_warps=4,
    )  # fmt: skip


@triton.jit
def slots_within_kernel(
    first_rank, dense_slot, ends, slots, M, capacity,  # int32 (M,), (M,), (P,), (M,)
    CHOICES_OF_A_PROGRAM: tl.constexpr,
):  # fmt: skip
    """`slots_within` of as many choices."""
    choice = tl.program_id(0).to(tl.int64) * CHOICES_OF_A_PROGRAM + tl.arange(0, CHOICES_OF_A_PROGRAM)
    dense = tl.load(dense_slot + choice, mask=choice < M, other=-1)
    rank = tl.load(first_rank + choice, mask=dense >= 0, other=0)
    place = dense - tl.load(ends + rank - 1, mask=rank > 0, other=0)
    slot = tl.where((dense >= 0) & (place < capacity), rank * capacity + place, -1)
    tl.store(slots + choice, slot, mask=choice < M)


def launch_slots_within(first_rank: Tensor, dense_slot: Tensor, ends: Tensor, capacity: int, slots: Tensor) -> None:
    """Fill `slots`, as in the kernel, from contiguous tensors."""
    blocks = ceil_div(slots.numel(), CHOICES_OF_A_PROGRAM)
    if blocks:
        launch(
            slots_within_kernel, blocks, first_rank, dense_slot, ends, slots, slots.numel(), capacity,
            CHOICES_OF_A_PROGRAM=CHOICES_OF_A_PROGRAM, num_warps=4,
        )  # fmt: skip


@triton.jit
def choice_places_kernel(
    topk_ids,  # integers (T, CHOICES) contiguous
    token_slot,  # int32 (T, CHOICES)
    places,  # int32 (T, CHOICES)
    dropped,  # int64 (), or None
    T, NUM_RANKS, NUM_EXPERTS,
    CHOICES: tl.constexpr, PADDED_CHOICES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`choice_places` of TOKENS tokens."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    choice = tl.arange(0, PADDED_CHOICES)
    inside = (token < T)[:, None] & (choice < CHOICES)[None, :]
    offsets = token[:, None] * CHOICES + choice[None, :]
    rank = ranks_of(topk_ids, offsets, inside, NUM_RANKS, NUM_EXPERTS)
    slot = tl.full((TOKENS, PADDED_CHOICES), -1, tl.int32)
    for number in range(CHOICES):
        of_number = ranks_of(topk_ids, token * CHOICES + number, token < T, NUM_RANKS, NUM_EXPERTS)
        shared = tl.load(token_slot + token * CHOICES + number, mask=token < T, other=-1)
        goes_there = (rank == of_number[:, None]) & (rank >= 0) & (shared >= 0)[:, None]
        slot = tl.where(goes_there, shared[:, None], slot)
    tl.store(places + offsets, tl.where(slot < 0, -1, slot * CHOICES + choice[None, :]), mask=inside)
    if dropped is not None:
        left_out = ((rank >= 0) & (slot < 0)).to(tl.int64)
        tl.atomic_add(dropped, tl.sum(tl.sum(left_out, axis=1), axis=0))


def launch_choice_places(
    topk_ids: Tensor, token_slot: Tensor, num_ranks: int, num_experts: int, places: Tensor, dropped: Tensor | None
) -> None:
    """Fill `places` and add to `dropped`, as in the kernel, from contiguous tensors."""
    num_tokens, choices = topk_ids.shape
    padded = power_of_2_from(choices)
    tokens = max(1, CHOICES_OF_A_PROGRAM // padded)
    blocks = ceil_div(num_tokens, tokens)
    if blocks:
        launch(
            choice_places_kernel, blocks,
            topk_ids, token_slot, places, dropped, num_tokens, num_ranks, num_experts,
            CHOICES=choices, PADDED_CHOICES=padded, TOKENS=tokens, num_warps=4,
        )  # fmt: skip
