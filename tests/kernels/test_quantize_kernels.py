"""Every quantization kernel equals the torch reference bit for bit: data, scales and layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_hopper_kernels
from fp8moe.kernels.activations import launch_quantize_activation
from fp8moe.kernels.weights import launch_quantize_weight
from fp8moe.operands import RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import quantize_tokens, quantize_weight_for_both, reference
from fp8moe.quantize.weights import Split
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, NON_FINITE_KINDS, SIZES, VALUE_KINDS, group_sizes, offsets, values
from tests.kernels.support import needs_hopper
from tests.measures import assert_same_bits

POISON = 0xA5  # no test passes because a buffer happened to hold the right bits
EDGE_SIZES = ([0], [1], [127], [128], [129], [0, 5, 0], [0, 0, 300, 0], [130, 0, 1, 64])

SIZES_OF_KERNELS = tuple(size for size in SIZES if size > 1)
"""Of one feature the definition is run: see `TritonGemm.missing_for_sizes`."""
long_tiles = st.sampled_from([256, 512])
formats = st.sampled_from(list(ScaleFormat))
layouts = st.sampled_from(list(TokenLayout))
dtypes = st.sampled_from(FLOAT_DTYPES)
kinds = st.sampled_from(VALUE_KINDS + NON_FINITE_KINDS)


def poison(*tensors: Tensor) -> None:
    for tensor in tensors:
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).fill_(POISON)


def poisoned_rows(groups: TokenGroups, num_features: int, device: torch.device) -> RowOperand:
    rows = RowOperand.empty(groups.capacity, num_features, device)
    poison(rows.data, rows.scale)
    return rows


def poisoned_tokens(
    groups: TokenGroups, num_features: int, layout: TokenLayout, device: torch.device, token_tile: int = 128
) -> TokenOperand:
    tokens = TokenOperand.empty(groups.capacity, num_features, layout, device, token_tile)
    poison(tokens.data, tokens.scale)
    return tokens


def assert_same_rows(actual: RowOperand, expected: RowOperand, groups: TokenGroups) -> None:
    used = int(groups.padded_ends[-1])
    assert actual.scale.stride() == expected.scale.stride()
    assert_same_bits(actual.data[:used], expected.data[:used])
    assert_same_bits(actual.scale[:used], expected.scale[:used])


def assert_same_tokens(actual: TokenOperand, expected: TokenOperand, groups: TokenGroups) -> None:
    used = int(groups.padded_ends[-1])
    assert actual.scale.stride() == expected.scale.stride()
    assert_same_bits(actual.scale[:, : used // 128], expected.scale[:, : used // 128])
    if actual.layout is TokenLayout.PER_EXPERT:
        flat = used * actual.scale.shape[0]
        assert_same_bits(actual.data[:flat], expected.data[:flat])
    else:
        assert_same_bits(actual.data[:, :used], expected.data[:, :used])


def check_activation(x: Tensor, offs: Tensor, scale_format: ScaleFormat, layout: TokenLayout) -> None:
    groups, num_features = plan_groups(offs, x.shape[0]), x.shape[1]
    expected_rows = reference.quantize_rows(x, groups, scale_format)
    expected_tokens = reference.quantize_tokens(x, groups, scale_format, layout)
    for write_rows, write_tokens in ((True, True), (True, False), (False, True)):
        for launch in launchers(x.device, write_tokens):
            rows = poisoned_rows(groups, num_features, x.device) if write_rows else None
            tokens = poisoned_tokens(groups, num_features, layout, x.device) if write_tokens else None
            launch(x, groups, rows, tokens, pow2=scale_format is ScaleFormat.POW2)
            if rows:
                assert_same_rows(rows, expected_rows, groups)
            if tokens:
                assert_same_tokens(tokens, expected_tokens, groups)


def launchers(device: torch.device, write_tokens: bool) -> list[Callable[..., None]]:
    """What quantizes activations on this device. Gluon cannot be interpreted: its kernel is tested on a GPU alone."""
    if not (write_tokens and runs_hopper_kernels(device)):
        return [launch_quantize_activation]
    from fp8moe.kernels.sm90.activations import launch_quantize_activation_hopper

    return [launch_quantize_activation, launch_quantize_activation_hopper]


@given(
    sizes=group_sizes(max_groups=3), unused_rows=st.sampled_from([0, 0, 1, 140]),
    features=st.sampled_from((128, *SIZES_OF_KERNELS)),
    dtype=dtypes, kind=kinds, scale_format=formats, layout=layouts, seed=st.integers(0, 99),
)  # fmt: skip
def test_activation_kernel_equals_reference(
    device: torch.device, sizes: list[int], unused_rows: int, features: int,
    dtype: torch.dtype, kind: str, scale_format: ScaleFormat, layout: TokenLayout, seed: int,
) -> None:  # fmt: skip
    x = values(kind, (sum(sizes) + unused_rows, features), dtype, seed).to(device)
    check_activation(x, offsets(sizes, device), scale_format, layout)


@pytest.mark.parametrize("sizes", EDGE_SIZES, ids=str)
@pytest.mark.parametrize("layout", TokenLayout)
def test_activation_kernel_at_edges(device: torch.device, sizes: list[int], layout: TokenLayout) -> None:
    x = values("outliers", (sum(sizes), 256), torch.bfloat16, 1).to(device)
    check_activation(x, offsets(sizes, device), ScaleFormat.FP32, layout)


@pytest.mark.parametrize("features", [2, 127, 200])
def test_activation_kernel_reads_and_writes_nothing_past_the_last_feature(device: torch.device, features: int) -> None:
    sizes = [130, 0, 1]
    x = torch.full((sum(sizes), 512), torch.nan, device=device)[:, 3 : 3 + features]
    x.copy_(values("outliers", x.shape, torch.float32, 1))
    groups = plan_groups(offsets(sizes, device), sum(sizes))
    expected = reference.quantize_rows(x, groups, ScaleFormat.FP32)
    for launch in launchers(device, write_tokens=True):
        rows = poisoned_rows(groups, features, device)
        # One feature more, whose memory follows: the next row of scales, or the next features.
        tokens = poisoned_tokens(groups, features + 1, TokenLayout.PER_EXPERT, device)
        data, scale = tokens.data[: features * groups.capacity], tokens.stored_scale.flatten()
        scale = scale[: features * groups.capacity // 128].view(-1, features)
        launch(x, groups, rows, TokenOperand(data, scale, TokenLayout.PER_EXPERT), pow2=False)
        assert_same_rows(rows, expected, groups)
        used = int(groups.padded_ends[-1])
        assert (rows.data[:used, features:].view(torch.uint8) == 0).all()
        assert (tokens.data[features * groups.capacity :].view(torch.uint8) == POISON).all()
        assert (tokens.stored_scale.flatten()[scale.numel() :].view(torch.uint8) == POISON).all()


@pytest.mark.parametrize("view", ["transposed", "row slice", "expanded", "column slice"])
def test_activation_kernel_takes_any_strides(device: torch.device, view: str) -> None:
    base = torch.randn(520, 520, device=device)
    x = {
        "transposed": base.t()[:200, :256],
        "row slice": base[::2, :256][:200],
        "expanded": base[:1, :256].expand(200, 256),
        "column slice": base[:200, 1:513:2],
    }[view]
    check_activation(x, offsets([70, 0, 130], device), ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE)


@pytest.mark.parametrize(
    ("row_blocks", "feature_blocks", "group"), [(5, 3, 0), (5, 3, 8), (3, 8, 8), (4, 19, 8), (1, 5, 2), (7, 1, 4)]
)
def test_a_grid_visits_each_block_once_and_a_group_of_features_in_all_rows_first(
    row_blocks: int, feature_blocks: int, group: int
) -> None:
    from fp8moe.kernels.sm90.activations import find_block

    number = range(row_blocks * feature_blocks)
    visited = [find_block.fn(n, row_blocks, feature_blocks, group) for n in number]
    group = group or feature_blocks
    blocks = [(row, feature) for row in range(row_blocks) for feature in range(feature_blocks)]
    assert visited == sorted(blocks, key=lambda block: (block[1] // group, block))


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("features", [1024, 1400, 2432])
@pytest.mark.parametrize("feature_blocks", [0, 3, 8, 16])
@pytest.mark.parametrize("token_tile", [128, 256])
def test_tokens_alone_in_any_order_of_the_grid(features: int, feature_blocks: int, token_tile: int) -> None:
    from fp8moe.kernels.sm90.activations import launch_quantize_activation_hopper
    from fp8moe.kernels.sm90.long_tiles import launch_quantize_long_tiles_hopper

    sizes, layout = [130, 0, 300, 1], TokenLayout.SIDE_BY_SIDE
    x = values("outliers", (sum(sizes), features), torch.bfloat16, 1).cuda()
    groups = plan_groups(offsets(sizes, "cuda"), sum(sizes))
    tokens = poisoned_tokens(groups, features, layout, x.device, token_tile)
    launch = launch_quantize_activation_hopper if token_tile == 128 else launch_quantize_long_tiles_hopper
    launch(x, groups, None, tokens, pow2=False, feature_blocks=feature_blocks)
    expected = reference.quantize_tokens(x, groups, ScaleFormat.FP32, layout, token_tile)
    assert_same_tokens(tokens, expected, groups)


def check_long_tiles(
    x: Tensor, offs: Tensor, scale_format: ScaleFormat, layout: TokenLayout, token_tile: int, *, rows: bool
) -> None:
    from fp8moe.kernels.sm90.long_tiles import launch_quantize_long_tiles_hopper

    groups, num_features = plan_groups(offs, x.shape[0]), x.shape[1]
    row_operand = poisoned_rows(groups, num_features, x.device) if rows else None
    tokens = poisoned_tokens(groups, num_features, layout, x.device, token_tile)
    launch_quantize_long_tiles_hopper(x, groups, row_operand, tokens, pow2=scale_format is ScaleFormat.POW2)
    if row_operand:
        assert_same_rows(row_operand, reference.quantize_rows(x, groups, scale_format), groups)
    assert_same_tokens(tokens, reference.quantize_tokens(x, groups, scale_format, layout, token_tile), groups)


@needs_hopper
@pytest.mark.gpu
@given(
    sizes=group_sizes(max_rows=1400), unused_rows=st.sampled_from([0, 0, 1, 140, 600]),
    dtype=dtypes, kind=kinds, scale_format=formats, layout=layouts, token_tile=long_tiles, rows=st.booleans(),
    features=st.sampled_from((256, *SIZES_OF_KERNELS)), seed=st.integers(0, 99),
)  # fmt: skip
def test_long_tiles_kernel_equals_reference(
    sizes: list[int], unused_rows: int, dtype: torch.dtype, kind: str, scale_format: ScaleFormat, layout: TokenLayout,
    token_tile: int, rows: bool, features: int, seed: int,
) -> None:  # fmt: skip
    x = values(kind, (sum(sizes) + unused_rows, features), dtype, seed).cuda()
    check_long_tiles(x, offsets(sizes, "cuda"), scale_format, layout, token_tile, rows=rows)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*EDGE_SIZES, [255, 256, 257, 511, 512, 513], [640, 128] * 75], ids=str)
@pytest.mark.parametrize("token_tile", [256, 512])
def test_long_tiles_kernel_at_edges(sizes: list[int], token_tile: int) -> None:
    x = values("outliers", (sum(sizes), 256), torch.bfloat16, 1).cuda()
    for view in (x, torch.cat([x, x], 1)[:, ::2]):
        check_long_tiles(view, offsets(sizes, "cuda"), ScaleFormat.FP32, TokenLayout.PER_EXPERT, token_tile, rows=True)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.large
def test_long_tiles_kernel_with_more_experts_than_lanes_and_more_row_blocks_than_a_grid_axis() -> None:
    sizes = [3] * 1030 + [65536 * 128, 300]
    x = values("normal", (1, 128), torch.bfloat16, 1).cuda().expand(sum(sizes), 128)
    groups = plan_groups(offsets(sizes, "cuda"), x.shape[0])
    tokens = quantize_tokens(x, groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE, 256)
    used = int(groups.padded_ends[-1])
    expected, scale = reference.quantize_tiles(x[:1].t().float(), (1,), ScaleFormat.FP32)
    live = (groups.row_source >= 0)[:used]
    codes = tokens.data.view(torch.uint8)[:, :used]
    assert_same_bits(tokens.scale[:, : used // 128], scale.expand(-1, used // 128))
    assert (codes == torch.where(live, expected.view(torch.uint8), 0)).all()


def beside(operands: list[WeightOperand], dim: int) -> WeightOperand:
    """One operand of several, side by side along `dim`."""
    data = torch.cat([operand.data.view(torch.uint8) for operand in operands], dim).view(torch.float8_e4m3fn)
    return WeightOperand(data, torch.cat([operand.scale for operand in operands], dim))


def check_weight(w: Tensor, scale_format: ScaleFormat, *, pairs: bool = False) -> None:
    """Of pairs, the operands are those of two weights, one behind the other."""
    weights = (w[:, 0::2], w[:, 1::2]) if pairs else (w,)
    operands = [reference.quantize_weight(weight, scale_format) for weight in weights]
    forward = beside([operand for operand, _ in operands], 1)
    dgrad = beside([operand for _, operand in operands], 2)
    if w.isfinite().all() and not pairs:
        assert not forward.data[:, w.shape[1] :].float().any()
        assert not forward.data[:, :, w.shape[2] :].float().any()
    for write_forward, write_dgrad in ((True, True), (True, False), (False, True)):
        forward_data = torch.empty_like(forward.data) if write_forward else None
        dgrad_data = torch.empty_like(dgrad.data) if write_dgrad else None
        scale = torch.empty_like(forward.scale)
        poison(scale, *(data for data in (forward_data, dgrad_data) if data is not None))
        launch_quantize_weight(w, forward_data, dgrad_data, scale, pow2=scale_format is ScaleFormat.POW2, pairs=pairs)
        assert_same_bits(scale, forward.scale)
        if forward_data is not None:
            assert_same_bits(forward_data, forward.data)
        if dgrad_data is not None:
            assert_same_bits(dgrad_data, dgrad.data)


@given(
    num_experts=st.integers(1, 2), n=st.sampled_from((128, 256, *SIZES_OF_KERNELS)),
    k=st.sampled_from((128, 256, *SIZES_OF_KERNELS)),
    dtype=dtypes, kind=kinds, scale_format=formats, seed=st.integers(0, 99),
)  # fmt: skip
def test_weight_kernel_equals_reference(
    device: torch.device, num_experts: int, n: int, k: int,
    dtype: torch.dtype, kind: str, scale_format: ScaleFormat, seed: int,
) -> None:  # fmt: skip
    w = values(kind, (num_experts, n, k), dtype, seed).to(device)
    check_weight(w, scale_format)


def test_weight_kernel_takes_any_strides(device: torch.device) -> None:
    w = torch.randn(2, 256, 384, device=device)
    check_weight(w.transpose(1, 2), ScaleFormat.FP32)
    check_weight(w[:, ::2, 128:], ScaleFormat.FP32)
    check_weight(w[:, 1::2, 3:203], ScaleFormat.FP32)
    check_weight(w.transpose(1, 2)[:, 1:260:2, :130], ScaleFormat.FP32)
    check_weight(w[:, :2].transpose(1, 2), ScaleFormat.FP32)


@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
def test_weight_kernel_reads_nothing_outside(device: torch.device, stored: str) -> None:
    around = torch.full((2, 300, 300), torch.nan, device=device)
    w = around[:, 50:250, 7:137] if stored == "E,N,K" else around[:, 50:180, 7:207].transpose(1, 2)
    w.copy_(torch.randn(w.shape))
    check_weight(w, ScaleFormat.FP32)


def test_weight_kernel_fills_a_slice_and_nothing_else(device: torch.device) -> None:
    w = torch.randn(2, 128, 256, device=device)
    forward, dgrad = reference.quantize_weight(w, ScaleFormat.FP32)
    all_forward = torch.full((2, 384, 256), POISON, dtype=torch.uint8, device=device)
    all_dgrad = torch.full((2, 256, 384), POISON, dtype=torch.uint8, device=device)
    all_scale = torch.full((2, 3, 2), -1.0, device=device)
    forward_data = all_forward[:, 128:256].view(torch.float8_e4m3fn)
    dgrad_data = all_dgrad[:, :, 128:256].view(torch.float8_e4m3fn)
    launch_quantize_weight(w, forward_data, dgrad_data, all_scale[:, 1:2], pow2=False)
    assert_same_bits(forward_data, forward.data)
    assert_same_bits(dgrad_data, dgrad.data)
    assert_same_bits(all_scale[:, 1:2], forward.scale)
    assert (all_forward[:, :128] == POISON).all()
    assert (all_forward[:, 256:] == POISON).all()
    assert (all_dgrad[:, :, :128] == POISON).all()
    assert (all_dgrad[:, :, 256:] == POISON).all()
    assert (all_scale[:, ::2] == -1).all()


def in_pairs(w: Tensor) -> Tensor:
    """`w` `(E, N, K)` stored `(E, K, N)`: its rows lie side by side."""
    return w.transpose(1, 2).contiguous().transpose(1, 2)


@given(
    num_experts=st.integers(1, 2), half=st.sampled_from((16, 128, 256, *SIZES_OF_KERNELS)),
    k=st.sampled_from((128, 256, *SIZES_OF_KERNELS)),
    dtype=dtypes, kind=kinds, scale_format=formats, seed=st.integers(0, 99),
)  # fmt: skip
def test_pairs_of_a_weight_equal_two_weights(
    device: torch.device, num_experts: int, half: int, k: int,
    dtype: torch.dtype, kind: str, scale_format: ScaleFormat, seed: int,
) -> None:  # fmt: skip
    w = values(kind, (num_experts, 2 * half, k), dtype, seed).to(device)
    check_weight(in_pairs(w), scale_format, pairs=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [6, 7])
def test_what_is_not_finite_spoils_one_of_the_pair(
    device: torch.device, dtype: torch.dtype, bad: float, row: int
) -> None:
    w = torch.randn(1, 256, 128, device=device).to(dtype)
    w[0, row, 5] = bad
    check_weight(in_pairs(w), ScaleFormat.FP32, pairs=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_pairs_with_signs_zeros_and_subnormals(device: torch.device, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    w = torch.tensor([-1.0, 0.5, -0.0, 0.0, smallest / 2, -smallest, 3.0, -2.0], device=device).to(dtype)
    for first, second in ((w, torch.zeros_like(w)), (-w, w.flip(0)), (torch.zeros_like(w), w)):
        both = torch.stack([first, second], 1).view(1, 16, 1).expand(1, 16, 130)
        check_weight(in_pairs(both), ScaleFormat.FP32, pairs=True)


@pytest.mark.parametrize("half", [128, 144, 200])
def test_pairs_read_nothing_outside(device: torch.device, half: int) -> None:
    around = torch.full((2, 300, 600), torch.nan, device=device, dtype=torch.bfloat16)
    w = around[:, 50:180, 64 : 64 + 2 * half].transpose(1, 2)
    w.copy_(torch.randn(w.shape))
    check_weight(w, ScaleFormat.FP32, pairs=True)


def test_pairs_fill_a_slice_and_nothing_else(device: torch.device) -> None:
    w = in_pairs(torch.randn(2, 256, 256, device=device))
    expected = [reference.quantize_weight(part, ScaleFormat.FP32) for part in (w[:, 0::2], w[:, 1::2])]
    all_forward = torch.full((2, 512, 256), POISON, dtype=torch.uint8, device=device)
    all_dgrad = torch.full((2, 256, 512), POISON, dtype=torch.uint8, device=device)
    all_scale = torch.full((2, 4, 2), -1.0, device=device)
    launch_quantize_weight(
        w, all_forward[:, 128:384].view(torch.float8_e4m3fn), all_dgrad[:, :, 128:384].view(torch.float8_e4m3fn),
        all_scale[:, 1:3], pow2=False, pairs=True,
    )  # fmt: skip
    for number, (forward, dgrad) in enumerate(expected):
        start = 128 + 128 * number
        assert_same_bits(all_forward[:, start : start + 128], forward.data.view(torch.uint8))
        assert_same_bits(all_dgrad[:, :, start : start + 128], dgrad.data.view(torch.uint8))
        assert_same_bits(all_scale[:, 1 + number : 2 + number], forward.scale)
    for rest in (all_forward[:, :128], all_forward[:, 384:], all_dgrad[:, :, :128], all_dgrad[:, :, 384:]):
        assert (rest == POISON).all()
    assert (all_scale[:, ::3] == -1).all()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_a_weight_is_quantized_only_if_it_has_changed(device: torch.device, pairs: bool, multiprocessors: int) -> None:
    w = in_pairs(torch.randn(3, 2 * 136, 200, device=device, dtype=torch.bfloat16))
    n = 2 * 256 if pairs else 384
    forward, dgrad = (
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) for shape in ((3, n, 256), (3, 256, n))
    )
    scale = torch.empty(3, n // 128, 2, device=device)
    for changed in ([0, 0, 0], [0, 0, 1]):
        poison(forward, dgrad, scale)
        launch_quantize_weight(
            w, forward, dgrad, scale, pow2=False, pairs=pairs,
            changed=torch.tensor(changed, dtype=torch.int32, device=device), multiprocessors=multiprocessors,
        )  # fmt: skip
        if not any(changed):
            assert all((tensor.view(torch.uint8) == POISON).all() for tensor in (forward, dgrad, scale))
    weights = (w[:, 0::2], w[:, 1::2]) if pairs else (w,)
    expected = [reference.quantize_weight(weight, ScaleFormat.FP32) for weight in weights]
    assert_same_bits(forward, beside([operand for operand, _ in expected], 1).data)
    assert_same_bits(dgrad, beside([operand for _, operand in expected], 2).data)
    assert_same_bits(scale, beside([operand for operand, _ in expected], 1).scale)


@pytest.mark.parametrize(
    ("stored", "half", "launches"),
    [("E,K,N", 144, 1), ("E,K,N", 256, 1), ("E,K,N", 200, 2), ("E,K,N, odd", 144, 2), ("E,N,K", 144, 2)],
)
def test_interleaved_weights_however_they_are_stored(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, stored: str, half: int, launches: int
) -> None:
    seen = []

    def counted(w: Tensor, *args: Any, **options: Any) -> None:
        seen.append(w)
        launch_quantize_weight(w, *args, **options)

    monkeypatch.setattr("fp8moe.kernels.weights.launch_quantize_weight", counted)
    monkeypatch.setattr("fp8moe.quantize.weights.runs_triton_fp8", lambda device: True)
    monkeypatch.setattr("fp8moe.quantize.weights.multiprocessors", lambda device: 2)
    base = torch.randn(2, 2 * half, 132, device=device, dtype=torch.bfloat16)
    odd = torch.empty(2, 132, 2 * half + 32, device=device, dtype=base.dtype)[:, :, 1 : 2 * half + 1].transpose(1, 2)
    w = {"E,N,K": base, "E,K,N": in_pairs(base), "E,K,N, odd": odd.copy_(base)}[stored]
    expected = [reference.quantize_weight(part, ScaleFormat.FP32) for part in (w[:, 0::2], w[:, 1::2])]
    forward, dgrad = quantize_weight_for_both(w, ScaleFormat.FP32, Split.INTERLEAVED)
    assert len(seen) == launches
    for dim, operand in ((1, forward), (2, dgrad)):
        both = beside([parts[dim - 1] for parts in expected], dim)
        assert_same_bits(operand.data, both.data)
        assert_same_bits(operand.scale, both.scale)
