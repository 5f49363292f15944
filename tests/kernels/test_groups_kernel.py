"""The kernels' plan equals that of `torch.bucketize`, which the tests hold to a plain loop; so do its ends alone."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.kernels.groups import ENDS, launch_ends_within, launch_plan_groups
from fp8moe.rows.groups import ends_by_cummax, ends_within, plan_by_bucketize, plan_groups
from tests.generators import group_sizes, offsets


def check(offs: torch.Tensor, num_tokens: int) -> None:
    expected = plan_by_bucketize(offs, num_tokens)
    plan = [torch.full_like(tensor, -7) for tensor in expected]
    launch_plan_groups(offs, num_tokens, plan)
    for actual, tensor in zip(plan, expected, strict=True):
        assert actual.tolist() == tensor.tolist()


def check_ends(offs: torch.Tensor, num_tokens: int) -> None:
    ends = torch.full_like(offs, -7)
    launch_ends_within(offs, num_tokens, ends)
    assert ends.tolist() == ends_by_cummax(offs, num_tokens).tolist()


@given(sizes=group_sizes(), unused_rows=st.sampled_from([0, 1, 129]))
@example(sizes=[0], unused_rows=0)
@example(sizes=[0, 0, 0], unused_rows=200)
def test_equals_bucketize(device: torch.device, sizes: list[int], unused_rows: int) -> None:
    check(offsets(sizes, device), sum(sizes) + unused_rows)


@given(offs=st.lists(st.integers(-50, 700), min_size=1, max_size=8), num_tokens=st.integers(0, 500))
def test_equals_bucketize_on_wrong_offsets(device: torch.device, offs: list[int], num_tokens: int) -> None:
    wrong = torch.tensor(offs, dtype=torch.int32, device=device)
    check(wrong, num_tokens)
    check_ends(wrong, num_tokens)


@pytest.mark.parametrize("num_groups", [1, 16, ENDS - 1, ENDS, ENDS + 1, 1024, 1025, 4 * ENDS + 5])
def test_ends_of_many_and_few_groups(device: torch.device, num_groups: int) -> None:
    rising = torch.arange(num_groups, dtype=torch.int32, device=device) * 7
    rows = 7 * num_groups
    check_ends(rising, rows)
    check_ends(rising, rows // 2)
    check_ends(rising.flip(0), rows)
    check_ends(rising - rows // 3, rows)
    check_ends(torch.randint_like(rising, -rows, 2 * rows), rows)
    check_ends(torch.randint_like(rising, -(2**31), 2**31 - 1), rows)
    check_ends(torch.randint_like(rising, -(2**31), 2**31 - 1), 0)


def test_ends_of_strided_offsets_are_contiguous(device: torch.device) -> None:
    wrong = torch.tensor([3, 9, -4, 9, 2, 9, 70, 9], dtype=torch.int32, device=device)[::2]
    ends = ends_within(wrong, 50)
    assert ends.is_contiguous()
    assert ends.tolist() == [3, 3, 3, 50]
    assert wrong.tolist() == [3, -4, 2, 70]


slow_to_interpret = pytest.mark.gpu


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1], id="1 of 1"),
        pytest.param([1] + [0] * 255, id="first of 256"),
        pytest.param([0] * 255 + [1], id="last of 256"),
        pytest.param([9000], id="9000"),
        pytest.param(list(range(20)), id="0..19"),
        pytest.param([3] * 256, id="3 each of 256", marks=slow_to_interpret),
        pytest.param([0] * 128 + [4000] + [0] * 127, id="all on one of 256", marks=slow_to_interpret),
        pytest.param([1] * 300, id="300 experts", marks=slow_to_interpret),
        pytest.param([2] * 1024, id="1024 experts", marks=slow_to_interpret),
    ],
)
def test_equals_bucketize_at_many_and_few_experts(device: torch.device, sizes: list[int]) -> None:
    check(offsets(sizes, device), sum(sizes) + 5)


@pytest.mark.gpu
def test_more_rows_than_the_kernels_of_a_grid_axis() -> None:
    num_tokens = 65537 * 128 + 77
    offs = torch.tensor([5, 5, 70000, num_tokens - 3], dtype=torch.int32, device="cuda")
    expected = plan_by_bucketize(offs, num_tokens)
    for actual, tensor in zip(plan_groups(offs, num_tokens).tensors, expected, strict=True):
        assert torch.equal(actual, tensor)
