"""The kernel gives every ragged row back, and zeros where there was none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.kernels.unpad import launch_unpad
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, group_sizes, offsets
from tests.measures import assert_same_bits


@given(
    sizes=group_sizes(), unused_rows=st.sampled_from([0, 1, 129]), columns=st.sampled_from([1, 128, 200, 640]),
    more_columns=st.sampled_from([0, 56]), dtype=st.sampled_from(FLOAT_DTYPES),
)  # fmt: skip
def test_gives_every_row_back(
    device: torch.device, sizes: list[int], unused_rows: int, columns: int, more_columns: int, dtype: torch.dtype
) -> None:
    ragged = torch.randn(sum(sizes) + unused_rows, columns).bfloat16().to(device)
    groups = plan_groups(offsets(sizes, device), ragged.shape[0])
    padded = torch.full((groups.capacity, columns + more_columns), torch.nan, dtype=torch.bfloat16, device=device)
    padded[groups.token_row[: sum(sizes)].long(), :columns] = ragged[: sum(sizes)]
    out = torch.full(ragged.shape, torch.nan, dtype=dtype, device=device)
    launch_unpad(padded, groups.token_row, out)
    assert_same_bits(out[: sum(sizes)], ragged[: sum(sizes)].to(dtype))
    assert (out[sum(sizes) :] == 0).all()


@pytest.mark.gpu
@pytest.mark.large
def test_more_row_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    num_rows = 65537 * 128 - 5
    padded = torch.randn(65537 * 128, 384, dtype=torch.bfloat16, device="cuda")
    token_row = torch.arange(num_rows, dtype=torch.int32, device="cuda") + 5
    out = torch.empty(num_rows, 384, dtype=torch.bfloat16, device="cuda")
    launch_unpad(padded, token_row, out)
    assert torch.equal(out, padded[5:])
