"""Launches of the kernels of `fp8moe.int8`, to be compiled ahead of time for a platform."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from fp8moe.int8.grouped_mm import units_of
from fp8moe.int8.groups import BLOCK_ROWS, most_rows, tiles_by_bucketize
from fp8moe.kernels.int8.grouped_mm import launch_int8_grouped_mm
from fp8moe.kernels.int8.groups import launch_plan_tiles
from fp8moe.kernels.int8.platform import ENOUGH_TILES, GroupedProduct, Platform, grouped_tile, scaled_tile
from fp8moe.kernels.int8.rows import launch_quantize_rows
from fp8moe.kernels.int8.scaled_mm import launch_int8_scaled_mm
from tests.generators import offsets

GROUPS = ((128, None), (128, 128), (128, 32), (4096, None))
"""The weight's group and the tile of the rows."""
FEW_PROGRAMS = "few programs"
"""In the names of launches for few tokens, whose tiles are the oddest."""
RARE_GROUPS = ((256, None), (320, None), (320, 64), (128, 64), (96, 32))
"""In tiles of 64 rows alone."""


def int8_launches(platform: Platform) -> Iterator[tuple[str, Callable[[], None]]]:
    """A name and a launch for each variant of each kernel."""
    offs, choice_row = offsets([100, 0, 200]), torch.zeros(150, 2, dtype=torch.int32)
    for num_experts in (3, 256):
        many = offs if num_experts == 3 else torch.zeros(num_experts, dtype=torch.int32)
        tiles = tiles_by_bucketize(many, 300, 64)
        maps = [choice_row.flatten(), torch.empty(300)]
        yield f"int8 plan, {num_experts}", partial(launch_plan_tiles, many, 300, 64, tiles, None, None, [])
        yield (
            f"int8 plan of choices, {num_experts}",
            partial(launch_plan_tiles, many, 300, 64, tiles, choice_row, torch.empty(150, 2), maps),
        )
    kinds = (
        (torch.bfloat16, 256, 256),
        (torch.float16, 7168, 128),
        (torch.float32, 7168, 7168),
        (torch.bfloat16, 9000, 9000),
    )
    for dtype, features, tile in kinds:
        x, codes = torch.empty(300, features, dtype=dtype), torch.empty(300, features, dtype=torch.int8)
        scales, name = torch.empty(300, -(-features // tile)), f"{dtype}, {features} by {tile}"
        yield f"int8 rows, {name}", partial(launch_quantize_rows, x, codes, scales, tile, 127, False)
        yield f"int4 rows, away, {name}", partial(launch_quantize_rows, x, codes, scales, tile, 7, True)
        smooth = partial(launch_quantize_rows, x, codes, scales, tile, 127, False, torch.empty(3, features), offs)
        yield f"int8 rows, smoothed, {name}", partial(smooth, choice_row.flatten())
        gate_up = torch.empty(300, 2 * features, dtype=dtype)
        swiglu = partial(launch_quantize_rows, gate_up, tile=tile, levels=127, away=False, up=features)
        yield f"int8 swiglu, {name}", partial(swiglu, codes=codes, scales=scales)
        yield f"swiglu, {name}", partial(swiglu, codes=torch.empty(300, features, dtype=dtype), scales=None)
    for block_rows, gated, int4 in product(BLOCK_ROWS, (False, True), (False, True)):
        for group, a_tile in (*GROUPS, *(RARE_GROUPS if block_rows == 64 else ())):
            if block_rows <= most_rows(4 if int4 else 8, a_tile is not None):
                yield grouped(platform, 4096, 512, block_rows, group, a_tile, int4, gated, in_fp16=False)
    for gated, int4 in product((False, True), (False, True)):
        yield grouped(platform, 4096, 512, 16, 128, None, int4, gated, in_fp16=True)
        yield grouped(platform, 4096, 512, 16, 128, 128 if gated else 32, int4, gated, in_fp16=False, row_tiles=8)
    for block_rows, int4 in product((4, 8), (False, True)):  # rows narrowed to a few, for more programs
        a_tile = 32 if block_rows == 4 else None
        yield grouped(platform, 640, 1024, block_rows, 128, a_tile, int4, swiglu=False, in_fp16=False, row_tiles=4)
        a_tile = 128 if block_rows == 4 else None
        yield grouped(platform, 1024, 1280, block_rows, 128, a_tile, int4, swiglu=True, in_fp16=False, row_tiles=4)
    yield grouped(platform, 200, 72, 64, 128, None, int4=True, swiglu=True, in_fp16=False)
    yield grouped(platform, 200, 36, 16, 128, 64, int4=False, swiglu=False, in_fp16=False)
    dense = ((1, 128, 256), (32, 4096, 4096), (33, 200, 200), (200, 200, 512), (4096, 4096, 4096))
    for (m, n, k), dtype in product(dense, (torch.bfloat16, torch.float32)):
        a, w = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
        block_rows, scaled = scaled_tile(platform, m, n, k)
        launch = partial(
            launch_int8_scaled_mm, a, w, torch.empty(m), torch.empty(n), torch.empty(n),
            torch.empty(m, n, dtype=dtype), block_rows=block_rows, tile=scaled, in_fp16=False,
        )  # fmt: skip
        yield f"int8 dense, {m}, {n}, {k}, {dtype}", launch


def grouped(
    platform: Platform, k: int, n: int, block_rows: int, group: int, a_tile: int | None, int4: bool, swiglu: bool,
    in_fp16: bool, row_tiles: int = ENOUGH_TILES,
) -> tuple[str, Callable[[], None]]:  # fmt: skip
    """As the layer launches it: gathering rows with SwiGLU, weighing them without."""
    unit, units_of_w, units_of_a = units_of(k, group, a_tile)
    rows = torch.empty(300, dtype=torch.int32)
    sizes = GroupedProduct(
        block_rows, unit, units_of_w, units_of_a, k, int4, swiglu, in_fp16, row_tiles=row_tiles, part_rows=256
    )
    weight = torch.empty(3, n // 2 if int4 else n, k, dtype=torch.uint8 if int4 else torch.int8)
    launch = partial(
        launch_int8_grouped_mm, torch.empty(300, k, dtype=torch.int8),
        torch.empty(300, 1 if a_tile is None else -(-k // a_tile)), rows if swiglu else None, weight,
        torch.empty(3, -(-k // group), n).transpose(1, 2), tiles_by_bucketize(offsets([100, 0, 200]), 300, block_rows),
        None if swiglu else torch.empty(300), torch.empty(300, n // 2 if swiglu else n, dtype=torch.bfloat16),
        product=sizes, up_first=False, tile=grouped_tile(platform, sizes), platform=platform,
    )  # fmt: skip
    tiles = FEW_PROGRAMS if row_tiles < ENOUGH_TILES else "many"
    name = f"{n} x {k}, {block_rows} rows, {tiles}, {group}, {a_tile}"
    return f"int8 grouped, {name}, {int4=}, {swiglu=}, {in_fp16=}", launch
