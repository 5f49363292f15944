"""Where tokens travel, and where their messages lie: the kernels equal definitions that do what they say."""

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8moe.rows.ranks
from fp8moe.kernels.ranks import launch_choice_places, launch_choose_ranks, launch_slots_within
from fp8moe.rows.ranks import (
    choice_places,
    choice_places_by_comparing,
    choose_ranks,
    choose_ranks_by_comparing,
    slots_within,
)
from fp8moe.rows.routing import route_choices
from tests.measures import assert_same_bits

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
CODE = 2**40 + 7


def draw(num_tokens: int, k: int, num_ranks: int, num_experts: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Ids of which some are of no expert."""
    lowest = 0 if dtype is torch.uint8 else -2
    end = min(num_ranks * num_experts + 1, torch.iinfo(dtype).max) + 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, end, (num_tokens, k), generator=generator).to(dtype)


shapes = given(
    num_tokens=st.sampled_from([0, 1, 63, 64, 65, 300]), k=st.sampled_from([1, 2, 3, 8]),
    num_ranks=st.sampled_from([1, 2, 5, 130]), num_experts=st.sampled_from([1, 7]),
    dtype=st.sampled_from(ID_DTYPES[:2]), seed=st.integers(0, 99),
)  # fmt: skip


@shapes
@example(num_tokens=65, k=3, num_ranks=5, num_experts=7, dtype=torch.uint8, seed=0)
@example(num_tokens=65, k=3, num_ranks=5, num_experts=7, dtype=torch.int16, seed=0)
@example(num_tokens=65, k=3, num_ranks=32, num_experts=8, dtype=torch.uint8, seed=0)  # no id is of no expert
def test_ranks_of_choices(
    device: torch.device, num_tokens: int, k: int, num_ranks: int, num_experts: int, dtype: torch.dtype, seed: int
) -> None:
    ids = draw(num_tokens, k, num_ranks, num_experts, dtype, seed)
    first_rank = torch.full(ids.shape, -7, dtype=torch.int32, device=device)
    sent = torch.zeros(num_ranks, 3, dtype=torch.int64, device=device)
    launch_choose_ranks(ids.to(device), num_ranks, num_experts, CODE, first_rank, sent)
    expected_rank, expected_sent = choose_ranks_by_comparing(ids.to(device), num_ranks, num_experts, CODE)
    assert_same_bits(first_rank, expected_rank)
    assert_same_bits(sent, expected_sent)

    messages: Counter[int] = Counter()
    rows: Counter[int] = Counter()
    for token, chosen in enumerate(ids.tolist()):
        ranks = [i // num_experts if 0 <= i < num_ranks * num_experts else -1 for i in chosen]
        rows.update(rank for rank in ranks if rank >= 0)
        messages.update({rank for rank in ranks if rank >= 0})
        seen = [rank if rank not in ranks[:j] else -1 for j, rank in enumerate(ranks)]
        assert first_rank[token].tolist() == seen
    assert sent.tolist() == [[messages[rank], rows[rank], CODE] for rank in range(num_ranks)]


def test_the_host_does_not_read_the_counts_of_very_many_ranks() -> None:
    """So a CUDA graph can have them. Fake tensors have nothing to read."""
    with FakeTensorMode():
        first_rank, sent = choose_ranks_by_comparing(torch.zeros(5, 2, dtype=torch.int64), 4096, 1, CODE)
    assert first_rank.shape == (5, 2)
    assert sent.shape == (4096, 3)


@shapes
@example(num_tokens=65, k=3, num_ranks=32, num_experts=8, dtype=torch.uint8, seed=0)
def test_places_of_choices(
    device: torch.device, num_tokens: int, k: int, num_ranks: int, num_experts: int, dtype: torch.dtype, seed: int
) -> None:
    ids = draw(num_tokens, k, num_ranks, num_experts, dtype, seed).to(device)
    first_rank, _ = choose_ranks(ids, num_ranks, num_experts)
    ends, dense = route_choices(first_rank, num_ranks)
    for capacity in (None, 1, 20):
        slot = dense if capacity is None else slots_within(first_rank, dense, ends, capacity)
        if capacity is not None:
            by_kernel = torch.full_like(slot, -7)
            launch_slots_within(first_rank, dense, ends, capacity, by_kernel)
            assert_same_bits(by_kernel, slot)
            used = slot[slot >= 0]
            assert len(used.unique()) == len(used)
            for rank in range(num_ranks):  # the first of a rank, in the order of the tokens
                of_rank = slot[first_rank == rank].tolist()
                wanted = [rank * capacity + place for place in range(min(capacity, len(of_rank)))]
                assert of_rank == wanted + [-1] * (len(of_rank) - len(wanted))
        places = torch.full(ids.shape, -7, dtype=torch.int32, device=device)
        dropped, expected_dropped = (torch.tensor(3, device=device) for _ in "12")
        launch_choice_places(ids, slot, num_ranks, num_experts, places, dropped)
        expected = choice_places_by_comparing(ids, slot, num_ranks, num_experts, expected_dropped)
        assert_same_bits(places, expected)
        assert int(dropped) == int(expected_dropped)
        is_expert = (ids.long() >= 0) & (ids.long() < num_ranks * num_experts)
        assert int(dropped) - 3 == int((is_expert & (places < 0)).sum())
        for choice in range(k):
            live = places[:, choice] >= 0
            assert (places[live, choice] % k == choice).all()
            shared = slot[live].amax(1) if num_ranks == 1 else places[live, choice] // k
            assert (places[live, choice] // k == shared).all()


def test_operators_launch_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever the device; ids of any strides."""
    ids = draw(90, 4, 3, 5, torch.int64, 0).to(device).t().contiguous().t()
    made = []
    for runs_kernels in (True, False):
        monkeypatch.setattr(fp8moe.rows.ranks, "runs_triton", lambda device, answer=runs_kernels: answer)
        dropped = torch.zeros((), dtype=torch.int64, device=device)
        first_rank, sent = choose_ranks(ids, 3, 5, CODE)
        ends, dense = route_choices(first_rank, 3)
        slot = slots_within(first_rank, dense, ends, 10)
        version = dropped._version
        made.append([first_rank, sent, slot, choice_places(ids, slot, 3, 5, dropped), dropped])
        assert dropped._version > version
        assert int(dropped) > 0
    for kernel, definition in zip(*made, strict=True):
        assert_same_bits(kernel, definition)


def test_operators_keep_their_promises_to_compilers() -> None:
    ids = draw(70, 3, 2, 4, torch.int64, 0)
    first_rank, _ = choose_ranks(ids, 2, 4)
    ends, dense = route_choices(first_rank, 2)
    ops = torch.ops.fp8moe
    torch.library.opcheck(ops.choose_ranks.default, (ids, 2, 4, CODE))
    torch.library.opcheck(ops.slots_within.default, (first_rank, dense, ends, 5))
    for dropped in (None, torch.zeros((), dtype=torch.int64)):
        torch.library.opcheck(ops.choice_places.default, (ids, dense, 2, 4, dropped))
