"""Which ranks and nodes a token visits, against enumeration; and what an exchange really sends."""

from itertools import combinations
from statistics import mean

import pytest

from fp8moe.bench.distributed.traffic import Ranks, exchanges, expected_distinct
from fp8moe.bench.shapes import layer_shape
from fp8moe.distributed import Dispatch


@pytest.mark.parametrize(("places", "num_experts", "k"), [(2, 8, 3), (4, 8, 2), (4, 12, 4), (8, 8, 3), (1, 6, 2)])
def test_expected_places_are_those_of_all_choices(places: int, num_experts: int, k: int) -> None:
    an_each = num_experts // places
    counts = [len({expert // an_each for expert in chosen}) for chosen in combinations(range(num_experts), k)]
    assert expected_distinct(places, num_experts, k) == pytest.approx(mean(counts))


def visits(chosen: tuple[int, ...], ranks: Ranks, home: int) -> tuple[int, int, int, int]:
    """Ranks, nodes, other ranks of the own node, ranks of other nodes."""
    visited = {expert * ranks.count // ranks.num_experts for expert in chosen}
    near = {rank for rank in visited if rank // ranks.per_node == home // ranks.per_node}
    nodes = {rank // ranks.per_node for rank in visited}
    return len(visited), len(nodes), len(near - {home}), len(visited - near)


@pytest.mark.parametrize(
    ("count", "per_node", "num_experts", "k"), [(4, 2, 8, 3), (6, 2, 12, 3), (4, 4, 8, 2), (2, 8, 8, 4), (8, 2, 8, 3)]
)
def test_visits_are_those_of_all_choices_from_all_homes(count: int, per_node: int, num_experts: int, k: int) -> None:
    ranks = Ranks(count, per_node, num_experts)
    all_choices = list(combinations(range(num_experts), k))
    found = [visits(chosen, ranks, home) for chosen in all_choices for home in range(count)]
    expected = [mean(column) for column in zip(*found, strict=True)]
    computed = ranks.visited(k), ranks.visited_nodes(k), ranks.visited_near(k), ranks.visited_far(k)
    assert computed == pytest.approx(expected)


def test_with_a_node_limit_experts_come_from_nodes_drawn_first() -> None:
    ranks = Ranks(8, 2, 16, node_limit=2)
    found = []
    for nodes in combinations(range(4), 2):
        in_reach = [expert for expert in range(16) if expert // 4 in nodes]
        for chosen in combinations(in_reach, 4):
            found += [visits(chosen, ranks, home) for home in range(8)]
    expected = [mean(column) for column in zip(*found, strict=True)]
    computed = ranks.visited(4), ranks.visited_nodes(4), ranks.visited_near(4), ranks.visited_far(4)
    assert computed == pytest.approx(expected)
    assert ranks.visited(4) < Ranks(8, 2, 16).visited(4)


def test_a_limit_of_all_nodes_is_none() -> None:
    limited, free = Ranks(8, 2, 16, node_limit=9), Ranks(8, 2, 16)
    assert (limited.visited(4), limited.visited_far(4)) == (free.visited(4), free.visited_far(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranks(12, 8, 24), "count is 12; it must be a multiple of per_node, 8"),
        (lambda: Ranks(8, 8, 12), "num_experts is 12; it must be a multiple of count, 8"),
        (lambda: Ranks(8, 2, 16, node_limit=0), "node_limit is 0"),
        (lambda: expected_distinct(2, 4, 5), "k is 5; it must be at most the number of experts in reach, 4"),
    ],
)
def test_what_cannot_be(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_fp8_sends_half_of_what_goes_to_the_experts() -> None:
    shape = layer_shape(4096, 8, 7168, 2048, 64)
    plain, bf16, fp8 = (exchanges(shape, dispatch) for dispatch in (None, Dispatch.BF16, Dispatch.FP8))
    assert plain == [2 * 7168] * 4
    assert bf16 == [2 * 7168 + 64, 2 * 7168, 2 * 7168, 2 * 7168, 32]
    assert fp8 == [7168 + 224 + 64, 2 * 7168, 7168 + 224, 2 * 7168 + 64]
