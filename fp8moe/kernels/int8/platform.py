"""Which kernel runs where, and in what tiles: the one place that knows platforms."""

from dataclasses import dataclass
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
BYTES_IN_FLIGHT = 36 * 1024
"""Of weights, in each multiprocessor: what 4.8 TB/s take of each of 132 while memory takes a microsecond to answer."""
MOST_SUMS = 128
"""Of a row of the weight, in a tile of few rows: more do not fit into registers."""
LONG_ENOUGH_TO_SLICE = 2048
"""Elements of K. On an H200 slices take 0.65 of the time that short units take with 16384, and 1.7 of it with 512."""
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
    in_fp16: bool = False
    """Whether the int8 dot of this platform's compiler is broken, so that products run in fp16, exactly."""


HOPPER = Platform("NVIDIA Hopper", True, True, 216 * 1024)
NVIDIA = Platform("NVIDIA, other", True, False, 96 * 1024)
PORTABLE = Platform("portable", False, False, 64 * 1024)
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


def grouped_tile(
    platform: Platform,
    block_rows: int,
    unit: int,
    units_of_w: int,
    units_of_a: int,
    num_features: int,
    int4: bool,
    swiglu: bool,
    block_k: int | None = None,
    row_tiles: int = ENOUGH_TILES,
    part_rows: int = 1,
) -> Tile:
    """The tile of `int8_grouped_mm` for tiles of `block_rows` rows; `unit` elements of K share all scales, and
    `units_of_w` and `units_of_a` are as in the kernel. There are `row_tiles` of them, and in each part of the weight
    `part_rows` byte rows.
    """
    slices = 1
    if block_k is None:
        block_k = block_k_for(unit, num_features, 64 if int4 else block_rows)
        if block_rows <= 32 and block_k == unit and num_features % 16 == 0 and num_features >= LONG_ENOUGH_TO_SLICE:
            operands = (2 if int4 else 1) * (2 if swiglu else 1)
            slices = slices_of(unit, units_of_w, num_features, MOST_SUMS // (operands * block_rows))
            block_k = unit * slices
    is_short = unit < min(SHORT_UNIT, num_features)
    is_one_block = unit <= block_k or unit >= num_features
    blocks = ceil_div(num_features, unit * slices) * ceil_div(unit * slices, block_k)
    parts, warps, rows = 2, 4, 64
    if block_rows <= 32:
        parts, rows = (2, 64) if swiglu else (1, 128)
        warps = 8 if rows == 128 and slices > 1 and (int4 or block_rows == 32) else 4
        while rows > MIN_ROWS and row_tiles * ceil_div(part_rows, rows) < ENOUGH_TILES:
            rows, warps = rows // 2, 4  # narrower tiles, and more of them
        most_stages = 6 if slices > 1 else 3 if blocks <= FEW_BLOCKS else 5
        if row_tiles * ceil_div(part_rows, rows) < 2 * ENOUGH_TILES:  # a multiprocessor has one program
            most_stages = min(MOST_STAGES, ceil_div(BYTES_IN_FLIGHT, parts * rows * block_k) + 1)
    elif not swiglu and (is_short or int4):
        parts, rows = 1, 128 if is_short and block_rows == 64 and not int4 else 64
        most_stages = 4
    elif block_rows == 64:
        warps, most_stages = 8 if int4 or not is_one_block else 4, 4
    else:
        warps, most_stages = 4 if is_one_block and not units_of_a else 8, 3
    if not platform.has_warpgroups:
        rows = max(MIN_ROWS, min(rows, 32 if int4 else 64))
    if block_k < SHORT_UNIT:  # as many bytes in flight, in more stages
        most_stages = min(2 * most_stages, MOST_STAGES)
    is_scaled = unit < num_features

    def stage_of(rows: int) -> int:
        """Bytes of codes and scales that are loaded at a time."""
        columns = block_rows * slices
        scales = parts * rows * (2 if int4 else 1) + (columns if units_of_a else 0)
        return (parts * rows + columns) * block_k + (4 * scales if is_scaled else 0)

    while rows > MIN_ROWS and stage_of(rows) > platform.shared_bytes:  # of a `block_k` that was named
        rows //= 2
    stage = stage_of(rows)
    if stage > platform.shared_bytes:
        raise ValueError(
            f"block_k is {block_k}; with tiles of {block_rows} rows it takes {stage} bytes of shared memory, and "
            f"{platform.name} has {platform.shared_bytes}: name a smaller one"
        )
    # Two thread blocks to a multiprocessor, unless that leaves one stage: then no load is ahead of its product.
    stages = platform.shared_bytes // (stage if slices > 1 else 2 * stage)
    stages = max(1, min(most_stages, blocks + 1, stages if stages > 1 else platform.shared_bytes // stage))
    return Tile(rows, parts, block_k, warps, stages, slices)


def scaled_tile(platform: Platform, num_rows: int, num_columns: int, num_features: int) -> tuple[int, Tile]:
    """Rows of `a` in a tile of `int8_scaled_mm`, and the rest of it."""
    block_rows = next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)
    widest = 32 if num_features % 16 else 256 if block_rows <= 32 else 128 if platform.has_warpgroups else 64
    block_k = min(widest, max(power_of_2_from(num_features), MIN_BLOCK_K))
    if block_rows <= 32:
        rows = next((rows for rows in (64, 32) if ceil_div(num_columns, rows) >= ENOUGH_TILES), MIN_ROWS)
        return block_rows, Tile(rows, 1, block_k, 4, 4 if rows == 64 else 6)
    if platform.has_warpgroups and ceil_div(num_rows, 128) * ceil_div(num_columns, 256) >= ENOUGH_TILES:
        return block_rows, Tile(256, 1, block_k, 8, 4)
    return block_rows, Tile(128, 1, block_k, 8 if block_rows == 128 else 4, 3)
