"""The grouped product: integer sums are exact, two ways; all else equals the definition up to the order of sums."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.int8.grouped_mm import BLOCK_K, grouped_mm_by_loop, int8_grouped_mm, units_of
from fp8moe.int8.groups import BLOCK_ROWS, RowTiles, most_rows, tiles_by_bucketize
from fp8moe.int8.weights import pack_int4
from fp8moe.kernels.int8.grouped_mm import launch_int8_grouped_mm
from fp8moe.kernels.int8.platform import (
    BYTES_IN_FLIGHT,
    HOPPER,
    MOST_STAGES,
    NVIDIA,
    PORTABLE,
    GroupedProduct,
    Platform,
    Tile,
    grouped_tile,
    platform_of,
)
from tests.generators import group_sizes, offsets
from tests.measures import assert_same_bits


def random_codes(*shape: int, bits: int = 8) -> Tensor:
    top = 127 if bits == 8 else 7
    return torch.randint(-top - (bits == 4), top + 1, shape, dtype=torch.int8)


def product(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, offs: Tensor, group_size: int, *, a_tile: int | None = None,
    swiglu: bool = False, up_first: bool = False, row_source: Tensor | None = None, row_weights: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32, block_rows: int = 16, block_k: int | None = None, in_fp16: bool = False,
    tile: Tile | None = None, whole_tiles: bool = False,
) -> Tensor:  # fmt: skip
    """Of the kernel: rows of no group are NaN."""
    num_rows = a.shape[0] if row_source is None else row_source.shape[0]
    platform = platform_of(a.device)
    unit, units_of_w, units_of_a = units_of(a.shape[1], group_size, a_tile)
    int4 = w.dtype == torch.uint8
    sizes = GroupedProduct(block_rows, unit, units_of_w, units_of_a, a.shape[1], int4, swiglu, in_fp16)
    tile = tile or grouped_tile(platform, sizes, block_k)
    if a.device.type == "cpu" and not whole_tiles:
        tile = replace(tile, rows=16)  # the interpreter takes so long as a tile is large
    out = torch.full((num_rows, w_scale.shape[1] // (1 + swiglu)), torch.nan, dtype=out_dtype, device=a.device)
    if num_rows:
        launch_int8_grouped_mm(
            a, a_scale, row_source, w, w_scale, tiles_by_bucketize(offs, num_rows, block_rows), row_weights, out,
            product=sizes, up_first=up_first, tile=tile, platform=platform,
        )  # fmt: skip
    return out


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.01 + 0.001


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_k", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("group_size", "num_features"),
    [(128, 272), (256, 272), (320, 400), (512, 528), (1000, 272), (96, 200), (192, 400), (256, 384), (512, 640)],
)
def test_integer_sums_are_exact_for_every_group_and_block(
    device: torch.device, bits: int, block_k: int, group_size: int, num_features: int
) -> None:
    """A scale of 1 for one group and 0 for all others, another one for each feature, shows the sums of each group."""
    sizes, num_columns = [1, 0, 4], 24
    a, w = random_codes(5, num_features), random_codes(3, num_columns, num_features, bits=bits)
    a[0], w[0] = 127, 127 if bits == 8 else -8  # the largest sums there are
    groups = -(-num_features // group_size)
    chosen = torch.arange(num_columns) % groups
    w_scale = (torch.arange(groups)[:, None] == chosen).float().expand(3, -1, -1).contiguous().transpose(1, 2)
    masked = torch.where(torch.arange(num_features) // group_size == chosen[:, None], w, 0).double()
    expected = torch.cat([a[:1].double() @ masked[0].t(), a[1:].double() @ masked[2].t()]).float()  # rounded once
    operand = w if bits == 8 else pack_int4(w, dim=1)
    a, ones, operand, w_scale, offs = (x.to(device) for x in (a, torch.ones(5, 1), operand, w_scale, offsets(sizes)))
    in_int8, in_fp16 = (
        product(a, ones, operand, w_scale, offs, group_size, block_k=block_k, in_fp16=flag) for flag in (False, True)
    )
    assert torch.equal(in_int8.cpu(), expected)
    assert_same_bits(in_int8, in_fp16)


@given(
    sizes=group_sizes(max_groups=4, max_rows=40),
    num_columns=st.sampled_from([2, 34, 40]),
    num_features=st.sampled_from([1, 8, 32, 64, 128, 130, 200, 257, 272, 384]),
    group_size=st.sampled_from([32, 96, 128, 256, 1000]),
    a_tile=st.sampled_from([None, "equal", "half", "double"]),
    bits=st.sampled_from([8, 4]),
    swiglu=st.booleans(),
    up_first=st.booleans(),
    gathered=st.booleans(),
    weighted=st.booleans(),
    block_rows=st.sampled_from(BLOCK_ROWS),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@example([0, 129, 1], 40, 200, 96, None, 4, True, True, True, True, 64, torch.float32, 0)
@example([127, 0, 128], 34, 257, 128, "half", 8, False, False, True, True, 128, torch.float32, 0)
@example([0, 5, 3], 40, 272, 128, "half", 4, True, False, True, False, 16, torch.float32, 0)
@example([0, 5, 3], 40, 272, 96, "half", 8, False, False, False, True, 32, torch.bfloat16, 0)
@example([0, 5, 3], 34, 64, 128, None, 8, False, False, False, False, 16, torch.float32, 0)
@example([0, 5, 3], 40, 32, 32, "equal", 4, False, False, False, False, 16, torch.float32, 0)
@example([1, 9, 0, 4], 40, 272, 128, "half", 4, True, False, True, True, 4, torch.float32, 0)
@example([1, 9, 0, 4], 40, 256, 64, "half", 8, False, False, False, True, 4, torch.float32, 0)
@example([3, 17, 8], 34, 256, 128, None, 8, False, False, True, False, 4, torch.float32, 0)
@example([0, 0], 34, 8, 128, None, 8, False, False, False, False, 16, torch.float32, 0)
def test_equals_definition(
    device: torch.device, sizes: list[int], num_columns: int, num_features: int, group_size: int, a_tile: str | None,
    bits: int, swiglu: bool, up_first: bool, gathered: bool, weighted: bool, block_rows: int, out_dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    num_columns *= 2 if swiglu and bits == 4 else 1
    num_rows = sum(sizes) + 3
    length = {None: None, "equal": group_size, "half": group_size // 2, "double": 2 * group_size}[a_tile]
    a = random_codes(11 if gathered else num_rows, num_features).to(device)
    a_scale = scales(a.shape[0], -(-num_features // (length or num_features))).to(device)
    w = random_codes(len(sizes), num_columns, num_features, bits=bits).to(device)
    w_scale = scales(len(sizes), -(-num_features // group_size), num_columns).transpose(1, 2).to(device)
    row_source = torch.randint(11, (num_rows,), dtype=torch.int32).to(device) if gathered else None
    row_weights = torch.rand(num_rows).to(device) if weighted else None
    offs = offsets(sizes, device)
    operand = w if bits == 8 else pack_int4(w, dim=1)
    out = product(
        a, a_scale, operand, w_scale, offs, group_size, a_tile=length, swiglu=swiglu, up_first=up_first,
        row_source=row_source, row_weights=row_weights, block_rows=block_rows, out_dtype=out_dtype,
    )  # fmt: skip
    expected = grouped_mm_by_loop(
        a, a_scale, operand, w_scale, offs, group_size, length, swiglu, up_first, row_source, row_weights, torch.float32
    )
    live = int(offs[-1])
    assert out[live:].isnan().all()
    rounding = 1e-5 if out_dtype is torch.float32 else 2**-8
    assert ((out[:live].float() - expected[:live]).abs() <= rounding * expected[:live].abs() + 2e-5).all()
    assert live == 0 or out[:live].float().abs().max() > 0


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_other_tiles_and_strided_operands_give_the_same_bits(device: torch.device, bits: int, swiglu: bool) -> None:
    a, a_scale = random_codes(70, 256).to(device), scales(70, 1).to(device)
    w, w_scale = random_codes(2, 136, 256, bits=bits).to(device), scales(2, 136, 2).to(device)
    operand, offs = w if bits == 8 else pack_int4(w, dim=1), offsets([40, 30], device)
    wide = torch.zeros(70, 300, dtype=torch.int8, device=device)
    wide[:, :256] = a
    outs = [
        product(a, a_scale, operand, w_scale, offs, 128, swiglu=swiglu, whole_tiles=True),
        product(wide[:, :256], a_scale, operand, w_scale, offs, 128, swiglu=swiglu, block_rows=64, whole_tiles=True),
        product(
            a, a_scale, operand, w_scale, offs, 128, swiglu=swiglu, block_rows=32,
            tile=Tile(rows=16, parts=2, block_k=64, warps=4, stages=2, band=1),
        ),
    ]  # fmt: skip
    assert_same_bits(outs[0], outs[1])
    assert_same_bits(outs[0], outs[2])


@pytest.mark.parametrize(("group_size", "a_tile", "slices"), [(128, 64, 2), (128, 32, 4), (256, 32, 4), (192, 32, 2)])
@pytest.mark.parametrize("block_rows", [4, 8, 16])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_are_multiplied_in_slices(
    device: torch.device, bits: int, swiglu: bool, block_rows: int, group_size: int, a_tile: int, slices: int
) -> None:
    """Gathered and weighed, where rows are few, the last slices and the last group are not whole, and one row has a
    tile that is NaN."""
    k = 400
    unit, units_of_w, units_of_a = units_of(k, group_size, a_tile)
    sizes = GroupedProduct(block_rows, unit, units_of_w, units_of_a, 4096, int4=False, swiglu=False)
    chosen = grouped_tile(HOPPER, sizes)
    assert (chosen.block_k, chosen.slices) == (unit * slices, slices)
    a, a_scale = random_codes(9, k).to(device), scales(9, -(-k // a_tile)).to(device)
    a_scale[4, -1] = torch.nan
    w, w_scale = random_codes(2, 24, k, bits=bits).to(device), scales(2, 24, -(-k // group_size)).to(device)
    operand, offs = w if bits == 8 else pack_int4(w, dim=1), offsets([15, 5], device)
    source = torch.arange(22, dtype=torch.int32, device=device) % 9
    weights = torch.rand(22, device=device)
    tile = Tile(rows=16, parts=1 + swiglu, block_k=unit * slices, warps=4, stages=2, slices=slices)
    out = product(
        a, a_scale, operand, w_scale, offs, group_size, a_tile=a_tile, swiglu=swiglu, row_source=source,
        row_weights=weights, block_rows=block_rows, tile=tile,
    )  # fmt: skip
    expected = grouped_mm_by_loop(
        a, a_scale, operand, w_scale, offs, group_size, a_tile, swiglu, False, source, weights, torch.float32
    )
    assert out[20:].isnan().all()
    torch.testing.assert_close(out[:20], expected[:20], rtol=1e-5, atol=2e-5, equal_nan=True)
    is_nan = source[:20] == 4
    assert torch.equal(out[:20].isnan().all(1), is_nan)
    assert torch.equal(out[:20].isnan().any(1), is_nan)


def test_rows_and_weights_that_are_columns_of_matrices(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    a, w = random_codes(6, 64).to(device), random_codes(2, 16, 64).to(device)
    source = torch.tensor([[5, 9], [4, 9], [3, 9], [2, 9]], dtype=torch.int32, device=device)[:, 0]
    given = a, scales(6, 1).to(device), w, scales(2, 16, 1).to(device), offsets([2, 2], device), 64
    weights = torch.rand(4, 2, device=device)[:, 0]
    outs = []
    for runs_kernels in (False, True):
        monkeypatch.setattr("fp8moe.int8.grouped_mm.runs_triton", lambda device, answer=runs_kernels: answer)
        outs.append(int8_grouped_mm(*given, row_source=source, row_weights=weights, out_dtype=torch.float32))
    torch.testing.assert_close(*outs)


def test_few_tiles_are_made_narrow_until_they_fill_a_gpu() -> None:
    many, few, fewest = (
        grouped_tile(
            HOPPER, GroupedProduct(16, 128, 1, 1, 2048, int4=False, swiglu=False, row_tiles=tiles, part_rows=512)
        )
        for tiles in (100, 8, 1)
    )
    assert [tile.rows for tile in (many, few, fewest)] == [128, 32, 16]
    assert few.stages > many.stages


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("int4", [False, True])
def test_few_programs_have_enough_in_flight(int4: bool, swiglu: bool) -> None:
    """By Little's law."""
    for row_tiles, part_rows in ((8, 512), (8, 1024), (2, 4096), (8, 4096)):
        tile = grouped_tile(
            HOPPER, GroupedProduct(16, 128, 1, 1, 4096, int4, swiglu, row_tiles=row_tiles, part_rows=part_rows)
        )
        programs = row_tiles * part_rows // tile.rows
        shared = (tile.parts * tile.rows + 16) * tile.block_k * tile.stages
        resident = max(1, min(programs / 132, 220 * 1024 // shared))
        in_flight = resident * (tile.stages - 1) * tile.parts * tile.rows * tile.block_k
        assert in_flight >= BYTES_IN_FLIGHT or tile.stages == MOST_STAGES


def test_a_block_that_is_named_fits_or_is_refused() -> None:
    """Together with the rows, the group and the tile of the rows."""
    sizes = GroupedProduct(128, 512, 1, 1, 4096, int4=False, swiglu=True)
    for block_k in BLOCK_K:
        tile = grouped_tile(NVIDIA, sizes, block_k)
        assert (tile.parts * tile.rows + 128) * tile.block_k * tile.stages <= 99 * 1024
    with pytest.raises(ValueError, match="block_k is 512; with tiles of 128 rows"):
        grouped_tile(PORTABLE, sizes, 512)


@given(
    platform=st.sampled_from([HOPPER, NVIDIA, PORTABLE]), block_rows=st.sampled_from(BLOCK_ROWS),
    num_features=st.sampled_from([32, 64, 200, 640, 768, 4096, 16384]), group=st.sampled_from([32, 96, 128, 320, 4096]),
    a_tile=st.sampled_from([None, "equal", "half", "quarter"]), int4=st.booleans(), swiglu=st.booleans(),
    row_tiles=st.sampled_from([1, 8, 300]), part_rows=st.sampled_from([16, 64, 1024, 16384]),
)  # fmt: skip
def test_every_tile_fits_its_platform(
    platform: Platform, block_rows: int, num_features: int, group: int, a_tile: str | None, int4: bool, swiglu: bool,
    row_tiles: int, part_rows: int,
) -> None:  # fmt: skip
    length = {None: None, "equal": group, "half": group // 2, "quarter": group // 4}[a_tile]
    assume(block_rows <= most_rows(4 if int4 else 8, length is not None))
    units = units_of(num_features, group, length)
    sizes = GroupedProduct(block_rows, *units, num_features, int4, swiglu, row_tiles=row_tiles, part_rows=part_rows)
    tile = grouped_tile(platform, sizes)
    columns = platform.lanes(block_rows, tile.slices) * tile.slices
    assert tile.stages * (tile.parts * tile.rows + columns) * tile.block_k <= platform.shared_bytes
    assert columns >= platform.min_columns
    assert sizes.units_of_w % tile.slices == 0


def test_loads_are_ahead_of_products_on_every_gpu() -> None:
    for platform, block_rows, int4 in itertools.product((HOPPER, NVIDIA), BLOCK_ROWS, (False, True)):
        if block_rows <= most_rows(4 if int4 else 8, tiled=True):
            tile = grouped_tile(platform, GroupedProduct(block_rows, 128, 1, 1, 4096, int4, swiglu=True))
            assert tile.stages > 1


def test_the_bound_of_the_grid_is_enough_for_a_plan_that_wastes_most(device: torch.device) -> None:
    sizes = [1] * 40
    a, w = random_codes(40, 32).to(device), random_codes(40, 16, 32).to(device)
    a_scale, w_scale = torch.ones(40, 1, device=device), torch.ones(40, 16, 1, device=device)
    out = product(a, a_scale, w, w_scale, offsets(sizes, device), 32, block_rows=128)
    assert RowTiles.count_for(40, 40, 128) == 40
    assert torch.equal(out, torch.einsum("mk,mnk->mn", a.double(), w.double()).float())


@pytest.mark.gpu
@pytest.mark.large
def test_more_elements_than_int32() -> None:
    tokens, k = 300_000, 8192
    a = torch.randint(-127, 128, (tokens, k), dtype=torch.int8, device="cuda")
    w = torch.randint(-127, 128, (2, 8192, k), dtype=torch.int8, device="cuda")
    a_scale, w_scale = torch.ones(tokens, 1, device="cuda"), torch.ones(2, 8192, 1, device="cuda")
    offs = torch.tensor([tokens - 5, tokens], dtype=torch.int32, device="cuda")
    out = product(a, a_scale, w, w_scale, offs, k, block_rows=128, out_dtype=torch.bfloat16)
    for rows, expert in ((slice(0, 64), 0), (slice(tokens - 64, tokens - 5), 0), (slice(tokens - 5, tokens), 1)):
        expected = (a[rows].double() @ w[expert].double().t()).float().bfloat16()
        assert torch.equal(out[rows], expected)
