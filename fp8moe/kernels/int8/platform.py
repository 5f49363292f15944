"""Which kernel runs where, and in what tiles: the one place that knows platforms."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from fp8moe.devices import compute_capability
from fp8moe.kernels.launch import ceil_div, power_of_2_from

MIN_BLOCK_K = 32
"""What an int8 instruction takes."""
MAX_INT32 = 2**31 - 1
MIN_ROWS = 16
"""Of a weight in a tile: what tensor cores take."""
SHORT_UNIT = 128
"""Elements of K: to read a weight in less wastes the rate of memory."""
ENOUGH_TILES = 128
"""To fill the multiprocessors."""
BYTES_IN_FLIGHT = 72 * 1024
"""Of weights, in each multiprocessor: what 4.8 TB/s take of each of 132 while memory takes 2 us to answer."""
MOST_SUMS = 128
"""Of a row of the weight, in a tile of few rows: more do not fit into registers."""
LONG_ENOUGH_TO_SLICE = 2048
"""Elements of K, in INT8; in INT4 twice as many; with tiles of 8 rows or fewer, any K is. On an H200 slices of an INT8
weight take 0.65 of the time that short units take with 16384 elements and 16 rows, 0.87 with 2048, and 1.4 with 1024;
with 4 rows and 512 elements 0.68."""
FEW_BLOCKS = 4
"""Of K: programs are so short that it is better to have more of them at a time than more stages."""
MOST_STAGES = 12
"""More are more code than they bring."""


@dataclass(frozen=True)
class Platform:
    """What kernels are compiled for."""

    name: str
    in_ptx: bool
    """Whether inline PTX may take the place of what Triton compiles badly."""
    has_warpgroups: bool
    """Whether tensor cores take operands from shared memory, by 64 rows: Hopper."""
    shared_bytes: int
    """That stages of one thread block may take."""
    min_columns: int
    """Of rows in a tile: what matrix units take."""
    in_fp16: bool = False
    """Whether the int8 dot of this platform's compiler is broken, so that products run in fp16, exactly."""

    def lanes(self, block_rows: int, slices: int) -> int:
        """Rows that a program computes: those of its tile, and idle ones where they make too few columns."""
        return max(block_rows, self.min_columns // slices)


HOPPER = Platform("NVIDIA Hopper", True, True, 222 * 1024, 8)
NVIDIA = Platform("NVIDIA, other", True, False, 96 * 1024, 8)
PORTABLE = Platform("portable", False, False, 64 * 1024, 16)
"""What Triton compiles to without anything of a vendor: AMD, and the interpreter."""


@cache
def platform_of(device: torch.device) -> Platform:
    """The platform that a device is."""
    capability = compute_capability(device)
    if capability is None:
        return PORTABLE
    return HOPPER if capability == (9, 0) else NVIDIA


@dataclass(frozen=True)
class Tile:
    """How one program computes its share of a product."""

    rows: int
    """Byte rows of the weight in a part: rows, or pairs of rows in INT4."""
    parts: int
    """Such parts; for SwiGLU gate and up."""
    block_k: int
    warps: int
    stages: int
    slices: int = 1
    """Units of K in `block_k`, for each of which a row is multiplied by itself."""
    band: int = 8
    """Tiles of rows that run side by side, so that they find weights in L2."""

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def block_k_for(unit: int, num_features: int, block_rows: int) -> int:
    """Elements of K at a time, where `unit` of them share all scales: few masked, and wide where rows are few."""
    widest = 256 if block_rows <= 32 else 128
    if num_features % 16:
        widest = MIN_BLOCK_K  # no vectors: an address for each element
    if unit >= num_features:
        return min(widest, max(power_of_2_from(num_features), MIN_BLOCK_K))
    if unit % widest == 0:
        return widest
    whole = next((size for size in (128, 64) if unit % size == 0), None)
    return min(widest, whole or max(power_of_2_from(unit), MIN_BLOCK_K))


def slices_of(unit: int, units_of_w: int, num_features: int, most: int) -> int:
    """How many units to read at a time, of one scale of the weight: so that it is read in no less than SHORT_UNIT."""
    slices = 1
    while unit * slices < min(SHORT_UNIT, num_features) and units_of_w % (2 * slices) == 0 and 2 * slices <= most:
        slices *= 2
    return slices


@dataclass(frozen=True)
class GroupedProduct:
    """The sizes of an `int8_grouped_mm`."""

    block_rows: int
    """Rows in a tile."""
    unit: int
    """Elements of K that share all scales."""
    units_of_w: int
    """Units that share a scale of the weight."""
    units_of_a: int
    """Units that share a scale of a row; 0: all do."""
    num_features: int
    """K."""
    int4: bool
    swiglu: bool
    in_fp16: bool = False
    row_tiles: int = ENOUGH_TILES
    """Tiles of rows there are."""
    part_rows: int = 1
    """Byte rows in each part of the weight."""

    @property
    def operands(self) -> int:
        """Sums for each row and byte row, with SwiGLU."""
        return (2 if self.int4 else 1) * (2 if self.swiglu else 1)

    @property
    def has_few_rows(self) -> bool:
        """Whether tiles are made for reading the weight fast, rather than for multiplying it."""
        return self.block_rows <= 32

    @property
    def is_short(self) -> bool:
        """Whether a unit is too short to read the weight in."""
        return self.unit < min(SHORT_UNIT, self.num_features)

    def is_one_block(self, block_k: int) -> bool:
        """Whether there is no sum of integers to keep from one step to the next."""
        return self.unit <= block_k or self.unit >= self.num_features

    def programs(self, rows: int) -> int:
        """Of few rows, with so many byte rows of each part."""
        return self.row_tiles * ceil_div(self.part_rows, rows)

    def is_alone(self, rows: int) -> bool:
        """Whether a multiprocessor has one of these programs."""
        return self.programs(rows) < 2 * ENOUGH_TILES

    def blocks(self, block_k: int, slices: int) -> int:
        """Steps along K."""
        span = self.unit * slices
        return ceil_div(self.num_features, span) * ceil_div(span, block_k)


def grouped_tile(platform: Platform, product: GroupedProduct, block_k: int | None = None) -> Tile:
    """The tile of `int8_grouped_mm`, as fast as any in a sweep on an H200; for other GPUs an estimate.

    Raises:
        ValueError: `block_k` is too large for the shared memory.
    """
    may_slice = block_k is None
    if block_k is None:
        block_k = block_k_for(product.unit, product.num_features, 64 if product.int4 else product.block_rows)
    if product.has_few_rows:
        tile = _tile_of_few_rows(product, block_k, may_slice)
    else:
        tile = _tile_of_many_rows(product, block_k)
    if not platform.has_warpgroups:
        tile = replace(tile, rows=max(MIN_ROWS, min(tile.rows, 32 if product.int4 else 64)))
    # A `block_k` that was named may take too much.
    while tile.rows > MIN_ROWS and _stage_bytes(platform, product, tile) > platform.shared_bytes:
        tile = replace(tile, rows=tile.rows // 2)
    stage = _stage_bytes(platform, product, tile)
    if stage > platform.shared_bytes:
        raise ValueError(
            f"block_k is {block_k}; with tiles of {product.block_rows} rows it takes {stage} bytes of shared memory, "
            f"and {platform.name} has {platform.shared_bytes}: name a smaller one"
        )
    # Two thread blocks to a multiprocessor, unless that leaves one stage: then no load is ahead of its product.
    has_narrow_slices = tile.slices > 1 and product.block_rows <= 16
    is_alone = has_narrow_slices or (product.has_few_rows and product.is_alone(tile.rows))
    fitting = platform.shared_bytes // (stage if is_alone else 2 * stage)
    fitting = fitting if fitting > 1 else platform.shared_bytes // stage
    return replace(tile, stages=max(1, min(tile.stages, product.blocks(tile.block_k, tile.slices) + 1, fitting)))


def _tile_of_few_rows(product: GroupedProduct, block_k: int, may_slice: bool) -> Tile:
    """The weight is what takes time: much of it in flight."""
    int4, swiglu, slices = product.int4, product.swiglu, 1
    is_long = product.block_rows <= 8 or product.num_features >= LONG_ENOUGH_TO_SLICE * (2 if int4 else 1)
    suits = product.block_rows <= (16 if int4 else 32) and block_k == product.unit and product.num_features % 16 == 0
    if may_slice and suits and is_long:
        most = MOST_SUMS // (product.operands * product.block_rows)
        slices = slices_of(product.unit, product.units_of_w, product.num_features, most)
        block_k = product.unit * slices
    fills_registers = slices > 1 and product.operands * product.block_rows * slices >= MOST_SUMS
    unpacks = int4 and product.block_rows <= 16 and slices == 1 and not product.in_fp16
    parts, rows = 2 if swiglu else 1, 64 if fills_registers or (swiglu and not unpacks) else 128
    while rows > MIN_ROWS and product.programs(rows) < ENOUGH_TILES:
        rows //= 2  # narrower tiles, and more of them
    if slices > 1 and product.blocks(block_k, slices) <= FEW_BLOCKS:
        stages = 3
    elif product.is_alone(rows):
        stages = min(MOST_STAGES, ceil_div(BYTES_IN_FLIGHT, parts * rows * block_k) + 1)
    elif slices > 1 or product.is_short:
        stages = 6
    else:
        stages = 3 if product.blocks(block_k, slices) <= FEW_BLOCKS or parts * rows > 128 else 5
    return Tile(rows, parts, block_k, warps=4, stages=stages, slices=slices)


def _tile_of_many_rows(product: GroupedProduct, block_k: int) -> Tile:
    """Multiplying and scaling is what takes time: as many sums as registers hold."""
    if not product.swiglu and (product.is_short or product.int4):
        rows = 128 if product.is_short and product.block_rows == 64 and not product.int4 else 64
        return Tile(rows, 1, block_k, warps=4, stages=4)
    if product.block_rows == 64:
        return Tile(64, 2, block_k, warps=8 if product.int4 or not product.is_one_block(block_k) else 4, stages=4)
    return Tile(64, 2, block_k, warps=4 if product.is_one_block(block_k) and not product.units_of_a else 8, stages=3)


def _stage_bytes(platform: Platform, product: GroupedProduct, tile: Tile) -> int:
    """Of codes and scales that are loaded at a time."""
    weight_rows, columns = tile.parts * tile.rows, platform.lanes(product.block_rows, tile.slices) * tile.slices
    scales = weight_rows * (2 if product.int4 else 1) + (columns if product.units_of_a else 0)
    is_scaled = product.unit < product.num_features
    return (weight_rows + columns) * tile.block_k + (4 * scales if is_scaled else 0)


def scaled_tile(platform: Platform, num_rows: int, num_columns: int, num_features: int) -> tuple[int, Tile]:
    """Rows of `a` in a tile of `int8_scaled_mm`, and the rest of it."""
    block_rows = next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)
    widest = 32 if num_features % 16 else 256 if block_rows <= 32 else 128 if platform.has_warpgroups else 64
    block_k = min(widest, max(power_of_2_from(num_features), MIN_BLOCK_K))
    if block_rows <= 32:
        rows = next((rows for rows in (64, 32) if 2 * ceil_div(num_columns, rows) >= ENOUGH_TILES), MIN_ROWS)
        tile = Tile(rows, 1, block_k, warps=4, stages=8)
    elif ceil_div(num_rows, block_rows) * ceil_div(num_columns, 128) < ENOUGH_TILES:
        tile = Tile(64, 1, block_k, warps=4, stages=5)
    else:
        tile = Tile(128, 1, block_k, warps=8 if block_rows == 128 else 4, stages=3)
    fitting = platform.shared_bytes // ((tile.rows + block_rows) * block_k)
    return block_rows, replace(tile, stages=max(1, min(tile.stages, fitting)))
