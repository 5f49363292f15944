"""The plan of tiles equals its definition, and the tiles cover each row of each group once."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.int8.groups import BLOCK_ROWS, RowTiles, maps_by_index, tiles_by_bucketize
from fp8moe.kernels.int8.groups import launch_plan_tiles
from fp8moe.rows.routing import route_by_sort
from tests.generators import choices, group_sizes, offsets


def planned(
    offs: torch.Tensor, num_rows: int, block_rows: int, choice_row: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    count = RowTiles.count_for(num_rows, offs.shape[0], block_rows)
    sizes = (offs.shape[0], 1, count, count)
    plan = [torch.full((size,), -77, dtype=torch.int32, device=offs.device) for size in sizes]
    maps = []
    if choice_row is not None:
        maps = [torch.zeros(num_rows, dtype=dtype, device=offs.device) for dtype in (torch.int32, torch.float32)]
    launch_plan_tiles(offs, num_rows, block_rows, plan, choice_row, topk_weights, maps)
    return plan + maps


@given(sizes=group_sizes(), unused=st.sampled_from([0, 1, 200]), block_rows=st.sampled_from(BLOCK_ROWS))
@example([0, 0, 0], 0, 16)
@example([1] * 300, 0, 16)
def test_equals_definition_and_covers_every_row_once(
    device: torch.device, sizes: list[int], unused: int, block_rows: int
) -> None:
    num_rows = sum(sizes) + unused
    offs = offsets(sizes, device)
    plan = planned(offs, num_rows, block_rows)
    for made, expected in zip(plan, tiles_by_bucketize(offs, num_rows, block_rows), strict=True):
        assert torch.equal(made, expected)
    ends, largest, experts, firsts = (tensor.tolist() for tensor in plan)
    assert largest == [max(sizes)]
    computed = []
    for expert, first in zip(experts, firsts, strict=True):
        if expert >= 0:
            computed += [(expert, row) for row in range(first, min(first + block_rows, ends[expert]))]
    assert computed == [(e, row) for e, end in enumerate(ends) for row in range(end - sizes[e], end)]


def test_wrong_offsets_are_corrected(device: torch.device) -> None:
    offs = torch.tensor([5, 3, 90, 20], dtype=torch.int32, device=device)
    plan = planned(offs, 40, 16)
    assert plan[0].tolist() == [5, 5, 40, 40]
    for made, expected in zip(plan, tiles_by_bucketize(offs, 40, 16), strict=True):
        assert torch.equal(made, expected)


@given(drawn=choices())
def test_tokens_and_weights_of_rows(device: torch.device, drawn: tuple[list[list[int]], int, int]) -> None:
    ids, num_experts, k = drawn
    topk_ids = torch.tensor(ids, dtype=torch.int64, device=device).view(-1, k)
    topk_weights = torch.rand(topk_ids.shape, device=device)
    ends, *_, choice_row = route_by_sort(topk_ids, None, num_experts)
    plan = planned(ends, choice_row.numel(), 32, choice_row, topk_weights)
    expected = tiles_by_bucketize(ends, choice_row.numel(), 32) + maps_by_index(choice_row, topk_weights)
    for made, definition in zip(plan, expected, strict=True):
        assert torch.equal(made, definition)


@pytest.mark.parametrize(("num_rows", "num_groups"), [(0, 5), (1, 5), (5, 5), (1000, 3)])
@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
def test_the_bound_is_met_by_the_worst_groups(num_rows: int, num_groups: int, block_rows: int) -> None:
    """One row more than whole tiles in as many groups as there can be."""
    used = min(num_rows, num_groups)
    whole = (num_rows - used) // block_rows
    assert RowTiles.count_for(num_rows, num_groups, block_rows) == whole + used
