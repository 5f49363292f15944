"""Tokens to messages and messages to operands: the kernels equal their definitions bit for bit."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import fp8moe.rows.combine
import fp8moe.rows.part_sums
from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_hopper_kernels
from fp8moe.kernels.activations import launch_quantize_activation
from fp8moe.kernels.messages import PackedChoices, launch_pack
from fp8moe.kernels.spread_rows import launch_spread_rows
from fp8moe.operands import TokenLayout
from fp8moe.quantize import messages as definition
from fp8moe.quantize import reference
from fp8moe.quantize.messages import (
    Choices,
    MessageLayout,
    Messages,
    dequantize,
    pack_by_index,
    pack_sums,
    requantize_messages,
    spread_messages,
)
from fp8moe.rows.combine import combine
from fp8moe.rows.groups import plan_groups
from fp8moe.rows.part_sums import sums_at_choices
from fp8moe.rows.routing import Routing
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, SIZES, VALUE_KINDS, offsets, values
from tests.generators import choices as routings
from tests.kernels.test_quantize_kernels import (
    POISON,
    assert_same_rows,
    assert_same_tokens,
    poisoned_rows,
    poisoned_tokens,
)
from tests.kernels.test_spread_kernel import choices
from tests.measures import assert_same_bits

SIZES_OF_KERNELS = tuple(size for size in SIZES if size > 1)


def poisoned_messages(count: int, layout: MessageLayout, device: torch.device) -> Messages:
    return Messages(torch.full((count, layout.num_bytes), POISON, dtype=torch.uint8, device=device), layout)


def packed(x: Tensor, num_choices: int = 0) -> Messages:
    """One message a token, in FP8, by definition."""
    messages = poisoned_messages(x.shape[0], MessageLayout(x.shape[1], num_choices, True), x.device)
    pack_by_index(x, torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None], messages)
    return messages


@given(
    num_tokens=st.sampled_from([0, 1, 31, 33, 129]), k=st.sampled_from([1, 2, 8]),
    num_features=st.sampled_from((1, 128, 256, *SIZES)), in_fp8=st.booleans(), dtype=st.sampled_from(FLOAT_DTYPES),
    kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS), skipped=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
@example(33, 2, 200, True, torch.float32, "outliers", 0.5, 0)
@example(33, 8, 130, False, torch.float16, "normal", 0.5, 1)
def test_pack_writes_the_messages_of_a_token_and_no_other_byte(
    device: torch.device, num_tokens: int, k: int, num_features: int, in_fp8: bool, dtype: torch.dtype, kind: str,
    skipped: float, seed: int,
) -> None:  # fmt: skip
    assume(not (in_fp8 and num_features == 1))  # see `SIZES_OF_KERNELS`
    x = values(kind, (num_tokens, num_features), dtype, seed).to(device)
    slots = choices(num_tokens, k, skipped, seed).to(device)
    expected, actual = (poisoned_messages(num_tokens * k, MessageLayout(num_features, k, in_fp8), device) for _ in "12")
    pack_by_index(x, slots, expected)
    if in_fp8:
        launch_pack(x, slots, actual.codes, actual.scale)
    else:
        launch_pack(x, slots, actual.values, None)
    if in_fp8 or kind not in NON_FINITE_KINDS:
        assert_same_bits(actual.data, expected.data)
    else:  # the bits of a NaN in bf16 are nobody's business
        torch.testing.assert_close(actual.values.float(), expected.values.float(), rtol=0, atol=0, equal_nan=True)
    unused = torch.ones(num_tokens * k, dtype=torch.bool, device=device)
    unused[slots[slots >= 0].long()] = False
    assert (actual.data[unused] == POISON).all()
    assert (actual.data[:, actual.layout.ids_start :] == POISON).all()


def test_pack_takes_any_strides(device: torch.device) -> None:
    x = torch.randn(300, 40, device=device).t()[::2, ::2]
    slots = torch.arange(20, dtype=torch.int32, device=device)[:, None]
    expected, actual = (poisoned_messages(20, MessageLayout(150, 0, True), device) for _ in "12")
    pack_by_index(x, slots, expected)
    launch_pack(x, slots, actual.codes, actual.scale)
    assert_same_bits(actual.data, expected.data)


def check_operands(messages: Messages, ids: Tensor, num_experts: int, layout: TokenLayout) -> None:
    """Of messages that chose the experts `ids` `(N, k)`, as the operands of what they stand for."""
    device, num_features = messages.data.device, messages.layout.num_features
    routing = Routing.from_topk(ids.to(device), num_experts)
    groups = routing.groups.gathering(routing.row_token)
    rows = poisoned_rows(groups, num_features, device)
    launch_spread_rows(messages.codes, routing.choice_row, groups, rows, pow2=True, x_scale=messages.scale)
    assert_same_rows(rows, reference.gather_codes(messages.codes, messages.scale, groups), groups)
    for token_tile, requantize in requantizers(device):
        tokens = poisoned_tokens(groups, num_features, layout, device, token_tile)
        requantize(messages.codes[:, :num_features], groups, None, tokens, pow2=True, x_scale=messages.scale)
        values_sent = dequantize(messages)
        expected = reference.quantize_tokens(values_sent, groups, ScaleFormat.POW2, layout, token_tile)
        assert_same_tokens(tokens, expected, groups)


def requantizers(device: torch.device) -> list[tuple[int, Callable[..., None]]]:
    """Each with its tile. Gluon cannot be interpreted: its kernels are tested on a GPU alone."""
    if not runs_hopper_kernels(device):
        return [(128, launch_quantize_activation)]
    from fp8moe.kernels.sm90.activations import launch_quantize_activation_hopper
    from fp8moe.kernels.sm90.long_tiles import launch_quantize_long_tiles_hopper

    return [
        (128, launch_quantize_activation), (128, launch_quantize_activation_hopper),
        (256, launch_quantize_long_tiles_hopper), (512, launch_quantize_long_tiles_hopper),
    ]  # fmt: skip


@given(
    num_tokens=st.sampled_from([0, 1, 31, 130]), k=st.sampled_from([1, 3, 8]), num_ranks=st.sampled_from([1, 2, 5]),
    num_experts=st.sampled_from([1, 7]), id_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    dtype=st.sampled_from(FLOAT_DTYPES), skipped=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_choices_are_numbered_as_on_their_rank(
    device: torch.device, num_tokens: int, k: int, num_ranks: int, num_experts: int, id_dtype: torch.dtype,
    dtype: torch.dtype, skipped: float, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, num_ranks * num_experts + 2, (num_tokens, k), generator=generator).to(id_dtype).to(device)
    weights = torch.rand(num_tokens, k, generator=generator).to(dtype).to(device)
    exists = (ids >= 0) & (ids < num_ranks * num_experts)
    slots = choices(num_tokens, k, skipped, seed).to(device).masked_fill(~exists, -1)
    actual = poisoned_messages(num_tokens * k, MessageLayout(16, k, False), device)
    expected = poisoned_messages(num_tokens * k, MessageLayout(16, k, False), device)
    pack_by_index(torch.zeros(num_tokens, 16, device=device), slots, expected, Choices(ids, weights, num_experts))
    packed_choices = PackedChoices(ids, weights, actual.ids, actual.weights, num_experts)
    launch_pack(torch.zeros(num_tokens, 16, device=device), slots, actual.values, None, packed_choices)
    assert_same_bits(actual.data, expected.data)
    for token, choice in (slots >= 0).nonzero().tolist():
        first = int(ids[token, choice]) // num_experts * num_experts
        local = [e - first if 0 <= e - first < num_experts else -1 for e in ids[token].tolist()]
        assert expected.ids[slots[token, choice]].tolist() == local


@given(
    drawn=routings(), num_features=st.sampled_from((128, 256, *SIZES_OF_KERNELS)),
    kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS), layout=st.sampled_from(list(TokenLayout)),
    num_choices=st.sampled_from([0, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_operands_of_messages_equal_their_definition(
    device: torch.device, drawn: tuple[list[list[int]], int, int], num_features: int, kind: str, layout: TokenLayout,
    num_choices: int, seed: int,
) -> None:  # fmt: skip
    ids, num_experts, k = drawn
    x = values(kind, (len(ids), num_features), torch.bfloat16, seed).to(device)
    check_operands(packed(x, num_choices), torch.tensor(ids).long().view(len(ids), k), num_experts, layout)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 17, 127, 128, 129])
@pytest.mark.parametrize("layout", TokenLayout)
@pytest.mark.parametrize("chosen", ["one", "by turns", "none"])
def test_operands_of_messages_at_edges(device: torch.device, num_tokens: int, layout: TokenLayout, chosen: str) -> None:
    x = values("outliers", (num_tokens, 256), torch.bfloat16, 1).to(device)
    numbers = torch.arange(num_tokens)[:, None] + torch.arange(2)
    ids = {"one": torch.full_like(numbers, 2), "by turns": numbers % 3, "none": torch.full_like(numbers, -1)}[chosen]
    check_operands(packed(x), ids, 3, layout)


@pytest.mark.parametrize(("has_rows", "has_parts"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("num_features", [2, 200, 256])
def test_gradients_go_home_in_messages(
    device: torch.device, has_rows: bool, has_parts: bool, num_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, parts = torch.randn(90, num_features, device=device).bfloat16(), torch.randn(3, 90, device=device)
    choice_row = torch.randint(-1, 90, (40, 4), dtype=torch.int32, device=device)
    made = []
    for runs_kernels in (True, False):
        for module in (fp8moe.rows.combine, fp8moe.rows.part_sums):
            monkeypatch.setattr(module, "runs_triton", lambda device, answer=runs_kernels: answer)
        made.append(pack_sums(rows if has_rows else None, parts if has_parts else None, choice_row))
        if has_rows:
            assert_same_bits(made[-1].values.contiguous(), combine(rows, choice_row, torch.bfloat16))
        if has_parts:
            assert_same_bits(made[-1].weights.contiguous(), sums_at_choices(parts, choice_row))
    assert made[0].layout.num_choices == (4 if has_parts else 0)
    assert made[0].values.shape == (40, num_features if has_rows else 0)
    assert made[0].data.shape[1] >= has_rows * num_features * 2 + has_parts * 16


@pytest.mark.parametrize("token_tile", [128, 256])
def test_operands_hold_what_was_sent(device: torch.device, token_tile: int) -> None:
    """Of values that no tile underflows, those of tokens that never travelled: with the same bits for rows."""
    x, sizes = torch.randn(300, 256, device=device).sign() * (1 + torch.rand(300, 256, device=device)), [130, 0, 170]
    groups = plan_groups(offsets(sizes, device), 300)
    ids = torch.tensor([0] * 130 + [2] * 170, device=device)[:, None]
    rows = spread_messages(packed(x), groups, Routing.from_topk(ids, 3).choice_row)
    tokens = requantize_messages(packed(x), groups, TokenLayout.SIDE_BY_SIDE, token_tile)
    stayed_rows = reference.quantize_rows(x, groups, ScaleFormat.POW2)
    stayed_tokens = reference.quantize_tokens(x, groups, ScaleFormat.POW2, TokenLayout.SIDE_BY_SIDE, token_tile)
    at = groups.token_row
    assert_same_bits(rows.data[at], stayed_rows.data[at])
    assert_same_bits(rows.scale[at], stayed_rows.scale[at])
    assert_same_bits(dequantize(packed(x)).t().contiguous(), reference.dequantize_tokens(tokens, groups)[:, at])
    assert_same_bits(
        reference.dequantize_tokens(tokens, groups)[:, at], reference.dequantize_tokens(stayed_tokens, groups)[:, at]
    )


@pytest.mark.parametrize("in_fp8", [True, False])
def test_pack_launches_kernels(device: torch.device, in_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever the device."""
    x, slots = torch.randn(70, 200, device=device), choices(70, 3, 0.4, 0).to(device)
    chosen = Choices(torch.randint(0, 9, (70, 3), device=device), torch.rand(70, 3, device=device), 3)
    made = []
    for runs_kernels in (True, False):
        for name in ("runs_triton", "runs_triton_fp8"):
            monkeypatch.setattr(definition, name, lambda device, answer=runs_kernels: answer)
        messages = definition.pack(x, slots, 210, in_fp8, chosen)
        sent = slots[slots >= 0].long()
        assert (messages.ids[sent] >= 0).any(1).all()
        unused = torch.ones(210, dtype=torch.bool, device=device).index_fill(0, sent, False)
        assert (messages.ids[unused] == -1).all()
        parts = [messages.ids[sent], messages.weights[sent]]
        if in_fp8:
            parts += [messages.codes[sent], messages.scale[sent]]
        else:
            parts += [messages.values[sent]]
        made.append(parts)
    for kernel, reference_ in zip(*made, strict=True):
        assert_same_bits(kernel, reference_)


@pytest.mark.gpu
@pytest.mark.large
def test_more_bytes_than_int32() -> None:
    num_tokens, num_features = 330_000, 7168
    x = torch.randn(num_tokens, num_features, dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(num_tokens, dtype=torch.int32, device="cuda")[:, None]
    messages = definition.pack(x, slots, num_tokens, True)
    groups = plan_groups(offsets([num_tokens], "cuda"), num_tokens)
    rows = spread_messages(messages, groups, slots)
    tokens = requantize_messages(messages, groups, TokenLayout.SIDE_BY_SIDE)
    last = slice(num_tokens - 256, num_tokens)
    expected = packed(x[last])
    assert_same_bits(messages.data[last], expected.data)
    assert_same_bits(rows.data[last], expected.codes)
    block = groups.capacity // 128 - 3
    tile = dequantize(packed(x[block * 128 : block * 128 + 128]))
    codes, scale = reference.quantize_tiles(tile.t(), (1,), ScaleFormat.POW2)
    assert_same_bits(tokens.data[:, block * 128 : block * 128 + 128], codes)
    assert_same_bits(tokens.scale[:, block], scale.squeeze(1))
