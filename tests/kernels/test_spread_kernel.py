"""The kernel copies each token to the rows of its choices, as PyTorch does bit for bit, and writes no other row."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.kernels.spread import launch_spread
from fp8moe.rows.spread import spread, spread_by_index
from tests.generators import FLOAT_DTYPES, VALUE_KINDS, values
from tests.measures import assert_same_bits


def choices(num_tokens: int, k: int, skipped: float, seed: int) -> torch.Tensor:
    """int32 `(T, k)`: different rows below `T * k`, and -1."""
    generator = torch.Generator().manual_seed(seed)
    choice_row = torch.randperm(num_tokens * k, generator=generator).view(num_tokens, k).int()
    return choice_row.masked_fill(torch.rand(num_tokens, k, generator=generator) < skipped, -1)


@given(
    num_tokens=st.sampled_from([0, 1, 7, 127, 129]),
    k=st.sampled_from([1, 2, 8, 9]),
    num_columns=st.sampled_from([1, 72, 100, 128, 2880]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    out_dtype=st.sampled_from(FLOAT_DTYPES),
    kind=st.sampled_from(VALUE_KINDS),
    skipped=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
@example(17, 8, 2880, torch.bfloat16, torch.bfloat16, "normal", 0.3, 0)
@example(129, 1, 100, torch.float32, torch.bfloat16, "outliers", 0.3, 0)
def test_equals_definition(
    device: torch.device, num_tokens: int, k: int, num_columns: int, dtype: torch.dtype, out_dtype: torch.dtype,
    kind: str, skipped: float, seed: int,
) -> None:  # fmt: skip
    tokens = values(kind, (num_tokens, num_columns), dtype, seed).to(device)
    choice_row = choices(num_tokens, k, skipped, seed).to(device)
    rows = torch.full((num_tokens * k, num_columns), torch.nan, dtype=out_dtype, device=device)
    launch_spread(tokens, choice_row, rows)
    used = choice_row[choice_row >= 0].long()
    assert_same_bits(rows[used], spread_by_index(tokens, choice_row, out_dtype)[used])
    unused = torch.ones(num_tokens * k, dtype=torch.bool, device=device).index_fill(0, used, False)
    assert rows[unused].isnan().all()


@pytest.mark.parametrize("strides", ["transposed", "expanded"])
def test_tokens_of_any_strides(device: torch.device, strides: str) -> None:
    tokens = torch.randn(64, 30, device=device).t() if strides == "transposed" else torch.randn(1, 64).expand(30, 64)
    choice_row = torch.randperm(60).view(30, 2).int().to(device)
    rows = spread(tokens.to(device), choice_row, torch.bfloat16)
    assert_same_bits(rows[choice_row.flatten().long()], tokens.to(device).bfloat16().repeat_interleave(2, dim=0))


@pytest.mark.gpu
@pytest.mark.large
def test_more_token_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    num_tokens = 65537 * 64
    tokens = torch.randn(num_tokens, 384, dtype=torch.bfloat16, device="cuda")
    choice_row = torch.arange(2 * num_tokens, dtype=torch.int32, device="cuda").view(2, num_tokens).t().contiguous()
    rows = torch.empty(2 * num_tokens, 384, dtype=torch.bfloat16, device="cuda")
    launch_spread(tokens, choice_row, rows)
    assert torch.equal(rows[:num_tokens], tokens)
    assert torch.equal(rows[num_tokens:], tokens)
