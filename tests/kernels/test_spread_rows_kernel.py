"""Quantizing a token once for all its rows gives the bits of quantizing each row, padding included."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.kernels.spread_rows import launch_spread_rows
from fp8moe.quantize import reference
from fp8moe.quantize.spread_rows import quantize_and_spread_rows
from fp8moe.rows.routing import Routing
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, SIZES, VALUE_KINDS, choices, values
from tests.kernels.test_quantize_kernels import POISON, assert_same_rows, poisoned_rows
from tests.measures import assert_same_bits

formats = st.sampled_from(list(ScaleFormat))
SIZES_OF_KERNELS = (128, *(size for size in SIZES if size > 1))
"""Of one feature the definition is run: see `TritonGemm.missing_for_sizes`."""


def check(x: Tensor, ids: Tensor, num_experts: int, scale_format: ScaleFormat) -> None:
    routing = Routing.from_topk(ids.to(x.device), num_experts)
    groups = routing.groups
    expected = reference.quantize_rows(x, groups.gathering(routing.row_token), scale_format)
    rows = poisoned_rows(groups, x.shape[1], x.device)
    launch_spread_rows(x, routing.choice_row, groups, rows, pow2=scale_format is ScaleFormat.POW2)
    assert_same_rows(rows, expected, groups)
    used = int(groups.padded_ends[-1])
    assert (rows.data[used:].view(torch.uint8) == POISON).all()
    assert (rows.stored_scale[:, used:].view(torch.uint8) == POISON).all()


@given(
    drawn=choices(), features=st.sampled_from(SIZES_OF_KERNELS), dtype=st.sampled_from(FLOAT_DTYPES),
    kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS), scale_format=formats, seed=st.integers(0, 99),
)  # fmt: skip
@example(([[0, 1], [1, 1], [-1, 2]] * 9, 2, 2), 200, torch.bfloat16, "outliers", ScaleFormat.FP32, 0)
def test_equals_reference(
    device: torch.device, drawn: tuple[list[list[int]], int, int], features: int, dtype: torch.dtype, kind: str,
    scale_format: ScaleFormat, seed: int,
) -> None:  # fmt: skip
    ids, num_experts, k = drawn
    x = values(kind, (len(ids), features), dtype, seed).to(device)
    check(x, torch.tensor(ids, dtype=torch.int64).view(len(ids), k), num_experts, scale_format)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 127, 128, 129])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("chosen", ["one", "by turns", "none", "again"])
def test_at_edges(device: torch.device, num_tokens: int, k: int, chosen: str) -> None:
    """All tokens on the last of three experts; on different experts; on none; on one expert with all their choices."""
    token, choice = torch.arange(num_tokens)[:, None], torch.arange(k)[None, :]
    ids = {
        "one": torch.where(choice == 0, 2, -1).expand(num_tokens, k),
        "by turns": (token + choice) % 3,
        "none": torch.full((num_tokens, k), -1),
        "again": (token % 2 * 2).expand(num_tokens, k),
    }[chosen]
    x = values("outliers", (num_tokens, 256), torch.bfloat16, 1).to(device)
    check(x, ids, 3, ScaleFormat.FP32)


@pytest.mark.parametrize("view", ["transposed", "row slice", "column slice", "expanded"])
def test_takes_any_strides(device: torch.device, view: str) -> None:
    base = values("outliers", (400, 400), torch.bfloat16, 1).to(device)
    x = {
        "transposed": base.t()[:100, :200],
        "row slice": base[::3, :200],
        "column slice": base[:100, 5:390:2],
        "expanded": base[:1, :200].expand(100, 200),
    }[view]
    check(x, torch.randint(-1, 5, (len(x), 3)), 5, ScaleFormat.POW2)


@pytest.mark.parametrize("features", [2, 127, 200])
def test_reads_nothing_past_the_last_feature(device: torch.device, features: int) -> None:
    x = torch.full((50, 512), torch.nan, device=device)[:, 3 : 3 + features]
    x.copy_(values("outliers", x.shape, torch.float32, 1))
    check(x, torch.randint(-1, 3, (50, 2)), 3, ScaleFormat.FP32)


@pytest.mark.parametrize("features", [1, 200, 256])
@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_the_operator_gives_the_rows_of_a_gathering_plan(
    device: torch.device, features: int, scale_format: ScaleFormat
) -> None:
    x, ids = torch.randn(70, features, device=device), torch.randint(-1, 4, (70, 3), device=device)
    routing = Routing.from_topk(ids, 4)
    gathering = routing.groups.gathering(routing.row_token)
    choice_row = routing.choice_row.t().contiguous().t()
    rows = quantize_and_spread_rows(x, gathering, choice_row, scale_format)
    assert_same_rows(rows, reference.quantize_rows(x, gathering, scale_format), gathering)


def test_the_operator_keeps_its_promises_to_compilers() -> None:
    x, ids = torch.randn(70, 200), torch.randint(-1, 4, (70, 3))
    routing = Routing.from_topk(ids, 4)
    plan = routing.groups.gathering(routing.row_token).tensors
    torch.library.opcheck(torch.ops.fp8moe.spread_rows.default, (x, plan, routing.choice_row, "fp32"))


@pytest.mark.gpu
@pytest.mark.large
def test_more_elements_than_int32() -> None:
    x = torch.randn(6 * 2**20, 384, dtype=torch.bfloat16, device="cuda")
    routing = Routing.from_topk(torch.tensor([0, 1], device="cuda").expand(len(x), 2), 2)
    rows = poisoned_rows(routing.groups, 384, x.device)
    launch_spread_rows(x, routing.choice_row, routing.groups, rows, pow2=False)
    last = x[-300:].float().view(300, 3, 128)
    codes, scale = reference.quantize_tiles(last, (2,), ScaleFormat.FP32)
    for row in routing.choice_row[-300:].long().unbind(1):
        padded_row = routing.groups.token_row[row].long()
        assert_same_bits(rows.data[padded_row], codes.view(300, 384))
        assert_same_bits(rows.scale[padded_row], scale.squeeze(2))
