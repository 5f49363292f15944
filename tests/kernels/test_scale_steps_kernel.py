"""The steps by which wgrad carries its sums over the scales of long token tiles, against a loop over the groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.kernels.sm90.scale_steps import launch_scale_steps
from fp8moe.operands import TokenGroups
from fp8moe.rows.groups import plan_groups
from tests.generators import group_sizes, offsets
from tests.measures import assert_same_bits


def steps_by_loop(scale: Tensor, groups: TokenGroups) -> Tensor:
    """Of the blocks that hold a group."""
    steps, start = scale.clone(), 0
    for end in (groups.padded_ends // 128).tolist():
        if end > start:
            steps[start : end - 1] /= scale[start + 1 : end]
        start = end
    return steps[:start].clamp(max=torch.finfo(torch.float32).max)


@pytest.mark.parametrize("num_features", [1, 127, 128, 1152])
@given(sizes=group_sizes(max_rows=900), unused_rows=st.sampled_from([0, 300]), seed=st.integers(0, 99))
def test_equals_a_loop(device: torch.device, num_features: int, sizes: list[int], unused_rows: int, seed: int) -> None:
    groups = plan_groups(offsets(sizes, device), sum(sizes) + unused_rows)
    if groups.capacity == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-69, 119, (groups.capacity // 128, num_features), generator=generator)
    scale = (torch.rand(exponent.shape, generator=generator) + 1).ldexp(exponent).to(device)
    scale[::3, ::5] = torch.nan
    expected = steps_by_loop(scale, groups)
    steps = launch_scale_steps(scale, groups.padded_ends)[: len(expected)]
    assert_same_bits(steps.isnan(), expected.isnan())
    assert_same_bits(steps.nan_to_num(), expected.nan_to_num())


def test_more_groups_than_a_program_compares_at_once(device: torch.device) -> None:
    groups = plan_groups(offsets([130, 0] * 300, device), 300 * 130)
    scale = torch.arange(1, groups.capacity // 128 + 1, device=device)[:, None].float().expand(-1, 128).contiguous()
    expected = steps_by_loop(scale, groups)
    assert_same_bits(launch_scale_steps(scale, groups.padded_ends)[: len(expected)], expected)
