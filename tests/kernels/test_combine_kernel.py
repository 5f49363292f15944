"""The kernel's sums equal, bit for bit, those of a loop over the choices in PyTorch, and touch no row of no choice."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fp8moe.kernels.combine import launch_combine
from fp8moe.rows.combine import combine_by_loop
from tests.generators import FLOAT_DTYPES, VALUE_KINDS, values
from tests.measures import assert_same_bits


@given(
    num_tokens=st.sampled_from([0, 1, 7, 17]),
    k=st.sampled_from([1, 2, 6, 8, 9, 64]),
    num_columns=st.sampled_from([1, 72, 100, 128, 640, 2880]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    out_dtype=st.sampled_from(FLOAT_DTYPES),
    kind=st.sampled_from(VALUE_KINDS),
    skipped=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
@example(17, 8, 2880, torch.bfloat16, torch.bfloat16, "normal", 0.3, 0)
@example(7, 64, 100, torch.float32, torch.float32, "outliers", 0.3, 0)
@example(17, 9, 72, torch.float16, torch.float32, "signed zeros", 0.0, 0)
def test_equals_loop(
    device: torch.device, num_tokens: int, k: int, num_columns: int, dtype: torch.dtype, out_dtype: torch.dtype,
    kind: str, skipped: float, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    num_rows = num_tokens * k + 5
    choice_row = torch.randperm(num_rows, generator=generator)[: num_tokens * k].view(num_tokens, k).int()
    choice_row[torch.rand(num_tokens, k, generator=generator) < skipped] = -1
    read = torch.zeros(num_rows, 1, dtype=torch.bool)
    read[choice_row[choice_row >= 0].long()] = True
    rows = torch.where(read, values(kind, (num_rows, num_columns), dtype, seed), torch.nan).to(device)
    choice_row = choice_row.to(device)
    out = torch.full((num_tokens, num_columns), torch.nan, dtype=out_dtype, device=device)
    launch_combine(rows, choice_row, out)
    assert not out.isnan().any() or kind == "huge"  # infinities may cancel
    assert_same_bits(out, combine_by_loop(rows, choice_row, out_dtype))


def test_adds_in_the_order_of_the_choices(device: torch.device) -> None:
    rows = torch.tensor([1e8, 1.0, -1e8], device=device)[:, None]
    choice_row = torch.tensor([[0, 1, 2], [0, 2, 1], [1, -1, -1], [-1, -1, -1]], dtype=torch.int32, device=device)
    out = torch.full((4, 1), torch.nan, device=device)
    launch_combine(rows, choice_row, out)
    assert out.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.gpu
@pytest.mark.large
def test_more_token_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    num_tokens = 65537 * 64
    rows = torch.randn(2 * num_tokens, 384, dtype=torch.bfloat16, device="cuda")
    choice_row = torch.arange(2 * num_tokens, dtype=torch.int32, device="cuda").view(2, num_tokens).t()
    out = torch.empty(num_tokens, 384, dtype=torch.bfloat16, device="cuda")
    launch_combine(rows, choice_row.contiguous(), out)
    for part in torch.arange(num_tokens, device="cuda").split(1 << 20):
        assert torch.equal(out[part], (rows[part].float() + rows[part + num_tokens].float()).bfloat16())
