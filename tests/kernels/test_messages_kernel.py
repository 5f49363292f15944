"""Tokens to messages and messages to operands: the kernels equal their definitions bit for bit."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.kernels.messages import launch_pack, launch_pack_choices, launch_unpack_operands
from fp8moe.operands import TokenLayout
from fp8moe.quantize import messages as definition
from fp8moe.quantize import reference
from fp8moe.quantize.messages import Choices, MessageLayout, Messages, dequantize, pack_by_index, unpack_by_definition
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, SIZES, VALUE_KINDS, group_sizes, offsets, values
from tests.kernels.test_quantize_kernels import (
    EDGE_SIZES,
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


def check_unpack(messages: Messages, sizes: Sequence[int], layout: TokenLayout, seed: int) -> None:
    device, num_features = messages.data.device, messages.layout.num_features
    groups = plan_groups(offsets(sizes, device), sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    copied = torch.randint(max(len(messages.data), 1), (groups.capacity,), generator=generator).int().to(device)
    groups = groups.gathering(torch.where(groups.row_source < 0, -1, copied))
    expected_rows, expected_tokens = unpack_by_definition(messages, groups, True, layout)
    for write_rows, write_tokens in ((True, True), (True, False), (False, True)):
        rows = poisoned_rows(groups, num_features, device) if write_rows else None
        tokens = poisoned_tokens(groups, num_features, layout, device) if write_tokens else None
        launch_unpack_operands(messages.codes, messages.scale, groups, num_features, rows, tokens)
        if rows and expected_rows:
            assert_same_rows(rows, expected_rows, groups)
        if tokens and expected_tokens:
            assert_same_tokens(tokens, expected_tokens, groups)


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
    launch_pack(torch.zeros(num_tokens, 16, device=device), slots, actual.values, None)
    launch_pack_choices(ids, weights, slots, actual.ids, actual.weights, num_experts)
    assert_same_bits(actual.data, expected.data)
    for token, choice in (slots >= 0).nonzero().tolist():
        first = int(ids[token, choice]) // num_experts * num_experts
        local = [e - first if 0 <= e - first < num_experts else -1 for e in ids[token].tolist()]
        assert expected.ids[slots[token, choice]].tolist() == local


@given(
    sizes=group_sizes(max_groups=3), num_features=st.sampled_from((128, 256, *SIZES_OF_KERNELS)),
    kind=st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS), layout=st.sampled_from(list(TokenLayout)),
    num_choices=st.sampled_from([0, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_unpack_equals_its_definition(
    device: torch.device, sizes: list[int], num_features: int, kind: str, layout: TokenLayout, num_choices: int,
    seed: int,
) -> None:  # fmt: skip
    x = values(kind, (max(sum(sizes) // 2, 1), num_features), torch.bfloat16, seed).to(device)
    check_unpack(packed(x, num_choices), sizes, layout, seed)


@pytest.mark.parametrize("sizes", EDGE_SIZES, ids=str)
@pytest.mark.parametrize("layout", TokenLayout)
def test_unpack_at_edges(device: torch.device, sizes: list[int], layout: TokenLayout) -> None:
    x = values("outliers", (max(sum(sizes), 1), 256), torch.bfloat16, 1).to(device)
    check_unpack(packed(x), sizes, layout, 0)


@pytest.mark.parametrize("token_tile", [128, 256])
def test_operands_hold_what_was_sent(device: torch.device, token_tile: int) -> None:
    """Of values that no tile underflows, those of tokens that never travelled: with the same bits for rows."""
    x, sizes = torch.randn(300, 256, device=device).sign() * (1 + torch.rand(300, 256, device=device)), [130, 0, 170]
    groups = plan_groups(offsets(sizes, device), 300)
    rows, tokens = definition.unpack_operands(
        packed(x), groups, rows=True, tokens=TokenLayout.SIDE_BY_SIDE, token_tile=token_tile
    )
    stayed_rows = reference.quantize_rows(x, groups, ScaleFormat.POW2)
    stayed_tokens = reference.quantize_tokens(x, groups, ScaleFormat.POW2, TokenLayout.SIDE_BY_SIDE, token_tile)
    assert rows
    assert tokens
    at = groups.token_row
    assert_same_bits(rows.data[at], stayed_rows.data[at])
    assert_same_bits(rows.scale[at], stayed_rows.scale[at])
    assert_same_bits(dequantize(packed(x)).t().contiguous(), reference.dequantize_tokens(tokens, groups)[:, at])
    assert_same_bits(
        reference.dequantize_tokens(tokens, groups)[:, at], reference.dequantize_tokens(stayed_tokens, groups)[:, at]
    )


@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize("token_tile", [128, 256])
def test_operators_launch_kernels(
    device: torch.device, in_fp8: bool, token_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whatever the device."""
    x, slots = torch.randn(70, 200, device=device), choices(70, 3, 0.4, 0).to(device)
    chosen = Choices(torch.randint(0, 9, (70, 3), device=device), torch.rand(70, 3, device=device), 3)
    groups = plan_groups(offsets([30, 0, 29], device), 59)
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
            rows, tokens = definition.unpack_operands(
                packed(x), groups, rows=True, tokens=TokenLayout.SIDE_BY_SIDE, token_tile=token_tile
            )
            assert rows
            assert tokens
            used = int(groups.padded_ends[-1])
            parts += [messages.codes[sent], messages.scale[sent], rows.data[:used], rows.scale[:used]]
            parts += [tokens.data[:, :used], tokens.scale[:, : used // 128]]
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
    rows, tokens = definition.unpack_operands(messages, groups, rows=True, tokens=TokenLayout.SIDE_BY_SIDE)
    assert rows
    assert tokens
    last = slice(num_tokens - 256, num_tokens)
    expected = packed(x[last])
    assert_same_bits(messages.data[last], expected.data)
    assert_same_bits(rows.data[last], expected.codes)
    block = groups.capacity // 128 - 3
    tile = dequantize(packed(x[block * 128 : block * 128 + 128]))
    codes, scale = reference.quantize_tiles(tile.t(), (1,), ScaleFormat.POW2)
    assert_same_bits(tokens.data[:, block * 128 : block * 128 + 128], codes)
    assert_same_bits(tokens.scale[:, block], scale.squeeze(1))
