"""`Routing` against a plain Python loop over tokens and their choices; what it is for; `combine`."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.quantize import quantize_rows
from fp8moe.rows.combine import combine
from fp8moe.rows.part_sums import sums_at_choices, sums_at_rows
from fp8moe.rows.routing import Routing
from tests.generators import FLOAT_DTYPES, choices
from tests.measures import assert_same_bits

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler on a CPU"
)


def routing_by_loop(ids: list[list[int]], num_experts: int) -> dict[str, list[int]]:
    """The routing, row by row; maps of choices are flat."""
    flat = [expert for token in ids for expert in token]
    num_choices, k = len(flat), len(ids[0]) if ids else 1
    ragged = 0
    row_choice: list[int] = []
    choice_row = [-1] * num_choices
    padded_row_of = {}
    ends, padded_ends = [], []
    for expert in range(num_experts):
        for choice in range(num_choices):
            if flat[choice] == expert:
                choice_row[choice] = ragged
                padded_row_of[ragged] = len(row_choice)
                row_choice.append(choice)
                ragged += 1
        while len(row_choice) % 128:
            row_choice.append(-1)
        ends.append(ragged)
        padded_ends.append(len(row_choice))
    capacity = (num_choices + 127 * min(num_experts, num_choices)) // 128 * 128
    row_choice += [-1] * (capacity - len(row_choice))
    return {
        "ends": ends,
        "padded_ends": padded_ends,
        "row_expert": [flat[choice] if choice >= 0 else -1 for choice in row_choice],
        "row_source": [choice_row[choice] if choice >= 0 else -1 for choice in row_choice],
        "token_row": [padded_row_of[row] if row < ragged else -1 for row in range(num_choices)],
        "row_token": [choice // k if choice >= 0 else -1 for choice in row_choice],
        "choice_row": choice_row,
    }


def check(topk_ids: Tensor, num_experts: int) -> None:
    routing = Routing.from_topk(topk_ids, num_experts)
    names = ("row_token", "choice_row")
    for name, values in routing_by_loop(topk_ids.tolist(), num_experts).items():
        actual = getattr(routing if name in names else routing.groups, name)
        assert actual.dtype == torch.int32, name
        assert actual.flatten().tolist() == values, name
    assert routing.choice_row.shape == topk_ids.shape
    assert routing.groups.num_rows == topk_ids.numel()
    assert routing.groups.num_groups == num_experts


@given(drawn=choices())
@example(drawn=([], 3, 2))
@example(drawn=([[-1, 3], [3, -1]], 3, 2))
@example(drawn=([[1] * 64] * 4, 3, 64))
def test_equals_loop(device: torch.device, drawn: tuple[list[list[int]], int, int]) -> None:
    ids, num_experts, k = drawn
    check(torch.tensor(ids, device=device).reshape(len(ids), k), num_experts)


@pytest.mark.parametrize("num_experts", [1, 8, 128, 1024, 1500])
def test_many_and_few_experts(device: torch.device, num_experts: int) -> None:
    check(torch.randint(-1, num_experts + 1, (70, 3), device=device), num_experts)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]
)
def test_any_integer_dtype(device: torch.device, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 13, (50, 4), device=device).to(dtype)
    check(ids, 13)
    check(ids, 9)
    check(ids, 300)  # more experts than a byte can name


def test_no_id_wraps_into_an_expert(device: torch.device) -> None:
    ids = torch.tensor([[0, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63), 256, -1, 4, 1]], device=device)
    check(ids, 4)
    routing = Routing.from_topk(ids, 4)
    assert routing.choice_row.tolist() == [[0, -1, -1, -1, -1, -1, -1, -1, -1, 1]]


def test_strided_ids(device: torch.device) -> None:
    ids = torch.randint(-1, 6, (4, 90), device=device)
    check(ids.t(), 5)
    check(ids[:, ::3], 5)


def test_the_list_of_tensors_is_the_routing() -> None:
    routing = Routing.from_topk(torch.randint(-1, 5, (30, 3)), 4)
    again = Routing.from_tensors(routing.tensors)
    assert again.groups.num_rows == 90
    for actual, expected in zip(again.tensors, routing.tensors, strict=True):
        assert actual is expected
    assert again.row_token is routing.row_token
    assert again.choice_row is routing.choice_row


def test_row_token_quantizes_from_the_tokens_without_a_permuted_copy(device: torch.device) -> None:
    hidden = torch.randn(70, 256, device=device).bfloat16()
    routing = Routing.from_topk(torch.randint(-1, 6, (70, 3), device=device), 5)
    permuted = torch.zeros(210, 256, dtype=torch.bfloat16, device=device)
    chosen = (routing.choice_row >= 0).nonzero()[:, 0]
    permuted[routing.choice_row[routing.choice_row >= 0].long()] = hidden[chosen]
    expected = quantize_rows(permuted, routing.groups, ScaleFormat.FP32)
    actual = quantize_rows(hidden, replace(routing.groups, row_source=routing.row_token), ScaleFormat.FP32)
    used = int(routing.groups.padded_ends[-1])
    assert_same_bits(actual.data[:used].view(torch.uint8), expected.data[:used].view(torch.uint8))
    assert_same_bits(actual.scale[:used], expected.scale[:used])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_combine_equals_loop(device: torch.device, dtype: torch.dtype) -> None:
    choice_row = Routing.from_topk(torch.randint(-1, 6, (40, 3), device=device), 5).choice_row
    rows = torch.randn(120, 72, device=device).to(dtype)
    unread = torch.ones(120, dtype=torch.bool, device=device)
    unread[choice_row[choice_row >= 0].long()] = False
    rows[unread] = torch.nan
    for out_dtype in FLOAT_DTYPES:
        expected = torch.zeros(40, 72, device=device)
        for token, chosen in enumerate(choice_row.tolist()):
            for row in chosen:
                if row >= 0:
                    expected[token] += rows[row].float()
        assert_same_bits(combine(rows, choice_row, out_dtype), expected.to(out_dtype))


def test_combine_adds_in_the_order_of_the_choices(device: torch.device) -> None:
    rows = torch.tensor([1e8, 1.0, -1e8], device=device)[:, None]
    choice_row = torch.tensor([[0, 1, 2], [0, 2, 1], [1, -1, -1], [-1, -1, -1]], dtype=torch.int32, device=device)
    assert combine(rows, choice_row, torch.float32).flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


def test_combine_is_the_backward_of_the_gather() -> None:
    routing = Routing.from_topk(torch.randint(-1, 6, (40, 3)), 5)
    hidden = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    live = routing.groups.token_row >= 0
    padded_row = routing.groups.token_row.clamp(min=0)
    rows = hidden[routing.row_token[padded_row].clamp(min=0)] * live[:, None]  # ragged
    d_rows = torch.randn(rows.shape).double()
    (d_hidden,) = torch.autograd.grad(rows, hidden, d_rows)
    torch.testing.assert_close(combine(d_rows.float(), routing.choice_row, torch.float32), d_hidden.float())


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64])
@pytest.mark.parametrize(("num_tokens", "k"), [(0, 2), (1, 1), (40, 3), (2000, 3)])
def test_weights_go_to_the_rows_of_their_choices(
    device: torch.device, num_tokens: int, k: int, dtype: torch.dtype
) -> None:
    topk_ids = torch.randint(-1, 6, (num_tokens, k), device=device)
    for weights in (torch.randn(num_tokens, k, device=device), torch.randn(k, num_tokens, device=device).t()):
        routing = Routing.from_topk(topk_ids, 5, weights.to(dtype))
        assert routing.row_weights is not None
        assert routing.row_weights.shape == (num_tokens * k,)
        chosen = routing.choice_row >= 0
        assert_same_bits(routing.row_weights[routing.choice_row[chosen].long()], weights.to(dtype)[chosen])


@pytest.mark.parametrize(("num_tokens", "k"), [(0, 2), (1, 1), (40, 3), (1000, 3)])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_parts_of_numbers_are_summed_in_order(device: torch.device, num_tokens: int, k: int, num_parts: int) -> None:
    routing = Routing.from_topk(torch.randint(-1, 6, (num_tokens, k), device=device), 5)
    parts = torch.randn(num_parts, num_tokens * k, device=device)
    used = int(routing.groups.ends[-1])
    parts[:, used:] = torch.nan  # of rows of no group
    expected = torch.zeros(num_tokens * k, device=device)
    for part in parts[:, :used]:
        expected[:used] += part
    assert_same_bits(sums_at_rows(parts, routing.groups.ends), expected)
    of_choices = torch.zeros(num_tokens, k, device=device)
    chosen = routing.choice_row >= 0
    of_choices[chosen] = expected[routing.choice_row[chosen].long()]
    assert_same_bits(sums_at_choices(parts, routing.choice_row), of_choices)


def layer(hidden: Tensor, topk_ids: Tensor) -> tuple[Tensor, ...]:
    routing = Routing.from_topk(topk_ids, 6, hidden[:, :3])
    rows = hidden[routing.row_token[routing.groups.token_row.clamp(min=0)].clamp(min=0)]
    out = combine(rows, routing.choice_row, hidden.dtype) * 2
    parts = rows[:, :2].t().contiguous()
    sums = sums_at_choices(parts, routing.choice_row), sums_at_rows(parts, routing.groups.ends)
    return out, *sums, *routing.tensors


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiles_whole_for_every_number_of_tokens(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    stance = "default"
    for num_tokens in (50, 3, 200):
        hidden, topk_ids = torch.randn(num_tokens, 24), torch.randint(-1, 7, (num_tokens, 3))
        with torch.compiler.set_stance(stance):
            actual = compiled(hidden, topk_ids)
        for mine, expected in zip(actual, layer(hidden, topk_ids), strict=True):
            assert_same_bits(mine, expected)
        stance = "fail_on_recompile"


@given(drawn=choices())
def test_first_rows_need_no_room_for_skipped_choices(
    device: torch.device, drawn: tuple[list[list[int]], int, int]
) -> None:
    """With room for no more rows than there are, all that is not room is the same."""
    ids, num_experts, k = drawn
    topk_ids = torch.tensor(ids, dtype=torch.int64, device=device).view(-1, k)
    routing = Routing.from_topk(topk_ids, num_experts, torch.rand(topk_ids.shape, device=device))
    num_rows = int(routing.groups.ends[-1])
    narrow, used = routing.first_rows(num_rows), int(routing.groups.padded_ends[-1])
    assert narrow.groups.num_rows == num_rows
    assert used <= narrow.groups.capacity <= routing.groups.capacity
    assert narrow.groups.capacity == narrow.groups.capacity_for(num_rows, num_experts)
    assert torch.equal(narrow.choice_row, routing.choice_row)
    for mine, whole in zip(narrow.groups.tensors, routing.groups.tensors, strict=True):
        assert torch.equal(mine, whole[: len(mine)])
    assert (narrow.groups.token_row >= 0).all()
    assert narrow.row_weights is not None
    assert len(narrow.row_weights) == num_rows
    x = torch.randn(len(topk_ids), 128, device=device)
    made, expected = (
        quantize_rows(x, route.groups.gathering(route.row_token), ScaleFormat.FP32) for route in (narrow, routing)
    )
    assert_same_bits(made.data[:used], expected.data[:used])


def test_combine_where_there_are_no_rows(device: torch.device) -> None:
    nowhere = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    out = combine(torch.empty(0, 5, dtype=torch.bfloat16, device=device), nowhere, torch.float32)
    assert_same_bits(out, torch.zeros(3, 5, device=device))
