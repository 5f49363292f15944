"""The kernel zeroes what is past the last group and leaves the rest alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.kernels.unused_rows import launch_zero_unused_rows
from tests.generators import FLOAT_DTYPES, group_sizes, offsets


@given(
    sizes=group_sizes(), unused_rows=st.sampled_from([0, 1, 127, 128, 129, 300]), columns=st.sampled_from([128, 1152]),
    dtype=st.sampled_from(FLOAT_DTYPES),
)  # fmt: skip
def test_zeroes_past_the_last_group_alone(
    device: torch.device, sizes: list[int], unused_rows: int, columns: int, dtype: torch.dtype
) -> None:
    used = sum(sizes)
    out = torch.full((used + unused_rows, columns), 7.0, dtype=dtype, device=device)
    out[used:] = torch.nan
    launch_zero_unused_rows(out, offsets(sizes, device))
    assert (out[:used] == 7.0).all()
    assert (out[used:] == 0.0).all()


@pytest.mark.gpu
@pytest.mark.large
def test_more_row_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    out = torch.full((65537 * 128, 384), 7.0, dtype=torch.bfloat16, device="cuda")
    launch_zero_unused_rows(out, offsets([5, 65536 * 128], "cuda"))
    used = 65536 * 128 + 5
    assert (out[used - 200 : used] == 7.0).all()
    assert (out[used:] == 0.0).all()
