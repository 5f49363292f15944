"""TokenGroups against a plain Python loop over experts and rows."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.operands import TokenGroups
from fp8moe.rows.groups import plan_groups
from tests.generators import group_sizes, offsets


def plan_by_loop(sizes: list[int], num_tokens: int) -> dict[str, list[int]]:
    """The plan, row by row."""
    capacity = (num_tokens + 127 * min(len(sizes), num_tokens)) // 128 * 128
    row_expert: list[int] = []
    row_source: list[int] = []
    token_row: list[int] = []
    ends: list[int] = []
    padded_ends: list[int] = []
    token = 0
    for expert, size in enumerate(sizes):
        for _ in range(size):
            token_row.append(len(row_source))
            row_source.append(token)
            row_expert.append(expert)
            token += 1
        while len(row_source) % 128:
            row_source.append(-1)
            row_expert.append(-1)
        ends.append(token)
        padded_ends.append(len(row_source))
    unused = [-1] * (capacity - len(row_source))
    return {
        "ends": ends,
        "padded_ends": padded_ends,
        "row_expert": row_expert + unused,
        "row_source": row_source + unused,
        "token_row": token_row + [-1] * (num_tokens - token),
    }


def check(sizes: list[int], unused_rows: int, device: torch.device) -> None:
    num_tokens = sum(sizes) + unused_rows
    groups = plan_groups(offsets(sizes, device), num_tokens)
    expected = plan_by_loop(sizes, num_tokens)
    for name, values in expected.items():
        actual = getattr(groups, name)
        assert actual.dtype == torch.int32, name
        assert actual.tolist() == values, name
    assert groups.num_groups == len(sizes)
    assert groups.capacity == len(expected["row_source"])


@given(sizes=group_sizes(), unused_rows=st.sampled_from([0, 0, 1, 129]))
@example(sizes=[0], unused_rows=0)
@example(sizes=[0, 0, 0], unused_rows=200)
def test_plan_equals_loop(device: torch.device, sizes: list[int], unused_rows: int) -> None:
    check(sizes, unused_rows, device)


@pytest.mark.parametrize(
    "sizes",
    [[1], [1] + [0] * 255, [0] * 255 + [1], [3] * 256, [0] * 128 + [4000] + [0] * 127, [70000], list(range(256))],
    ids=["1 of 1", "1 first of 256", "1 last of 256", "3 each of 256", "all on one of 256", "70000", "0..255"],
)
def test_plan_at_many_and_few_experts(device: torch.device, sizes: list[int]) -> None:
    check(sizes, 5, device)


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=40), unused_rows=st.integers(0, 5))
def test_capacity_suffices_for_any_routing_and_depends_on_none(sizes: list[int], unused_rows: int) -> None:
    num_tokens = sum(sizes) + unused_rows
    capacity = TokenGroups.capacity_for(num_tokens, len(sizes))
    assert sum((size + 127) // 128 * 128 for size in sizes) <= capacity
    assert capacity % 128 == 0
    assert capacity <= num_tokens + 127 * len(sizes)


@given(offs=st.lists(st.integers(-50, 700), min_size=1, max_size=8), num_tokens=st.integers(0, 500))
def test_wrong_offsets_never_lead_out_of_bounds(offs: list[int], num_tokens: int) -> None:
    groups = plan_groups(torch.tensor(offs, dtype=torch.int32), num_tokens)
    sources = groups.row_source[groups.row_source >= 0].tolist()
    assert sources == list(range(max(0, min(num_tokens, max(offs)))))
    assert int(groups.padded_ends[-1]) <= groups.capacity
    assert all(0 <= row < groups.capacity for row in groups.token_row[: len(sources)].tolist())


def test_more_experts_than_the_planning_kernel_takes(device: torch.device) -> None:
    check([1] * 1500, 5, device)
