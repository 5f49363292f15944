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
MOST_STAGES = 12
"""More are more code than they bring."""


@dataclass(frozen=True)
class Platform:
    """What kernels are compiled for."""

    name: str
    in_ptx: bool
    """Whether inline PTX may take the place of what Triton compiles badly."""
    limits_registers: bool
    """Whether the compiler takes `maxnreg`."""
    has_warpgroups: bool
    """Whether tensor cores take operands from shared memory, by 64 rows: Hopper."""
    shared_bytes: int
    """That stages of one thread block may take."""
    in_fp16: bool = False
    """Whether the int8 dot of this platform's compiler is broken, so that products run in fp16, exactly."""


HOPPER = Platform("NVIDIA Hopper", True, True, True, 216 * 1024)
NVIDIA = Platform("NVIDIA, other", True, True, False, 96 * 1024)
PORTABLE = Platform("portable", False, False, False, 64 * 1024)
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
    """Parts of `block_k`, each with scales of its own, for which the whole of it is multiplied."""
    registers: int | None = None
    """A thread may have; None: as many as the compiler likes."""
    band: int = 8
    """Tiles of rows that run side by side, so that they find weights in L2."""

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


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


def grouped_tile(
    platform: Platform,
    block_rows: int,
    unit: int,
    units_of_a: int,
    num_features: int,
    int4: bool,
    swiglu: bool,
    block_k: int | None = None,
    row_tiles: int = ENOUGH_TILES,
    part_rows: int = 1,
) -> Tile:
    """The tile of `int8_grouped_mm` for tiles of `block_rows` rows; `unit` elements of K share all scales, and
    `units_of_a` as in the kernel. There are `row_tiles` of them, and in each part of the weight `part_rows` byte rows.
    """
    slices = 1
    if block_k is None:
        block_k = block_k_for(unit, num_features, 64 if int4 else block_rows)
        if block_rows <= 32 and block_k == unit < min(SHORT_UNIT, num_features) and num_features % 16 == 0:
            sums = 4 if int4 and swiglu else 2 if int4 or swiglu else 1  # for each slice, in registers
            slices = min(SHORT_UNIT // unit, (8 if block_rows <= 16 else 4) // sums)
            block_k = unit * slices
    is_one_block = unit <= block_k or unit >= num_features
    registers = None
    rows = 64 if platform.has_warpgroups or not int4 else 32
    if block_rows <= 32:
        parts, warps = 2 if swiglu else 1, 4
        while rows > MIN_ROWS and row_tiles * ceil_div(part_rows, rows) < ENOUGH_TILES:
            rows //= 2  # narrower tiles, and more of them
        most_stages = 5
        if row_tiles * ceil_div(part_rows, rows) < 2 * ENOUGH_TILES:  # a multiprocessor has one program
            most_stages = min(MOST_STAGES, ceil_div(BYTES_IN_FLIGHT, parts * rows * block_k) + 1)
    elif block_rows == 64:
        parts, warps, most_stages = 2, 8 if int4 or not is_one_block else 4, 4
    else:
        parts, warps, most_stages = 2 if swiglu or not int4 else 1, 8, 3
        if platform.limits_registers and not int4 and is_one_block and not units_of_a:
            registers = 128  # two thread blocks to a multiprocessor: one scales while the other multiplies
    if block_k < SHORT_UNIT:  # as many bytes in flight, in more stages
        most_stages = min(2 * most_stages, MOST_STAGES)
    is_scaled = unit < num_features

    def stage_of(rows: int) -> int:
        """Bytes of codes and scales that are loaded at a time."""
        scales = parts * rows * (2 if int4 else 1) + (block_rows if units_of_a else 0)
        return (parts * rows + block_rows * slices) * block_k + (4 * scales * slices if is_scaled else 0)

    while rows > MIN_ROWS and stage_of(rows) > platform.shared_bytes:  # of a `block_k` that was named
        rows //= 2
    stage = stage_of(rows)
    if stage > platform.shared_bytes:
        raise ValueError(
            f"block_k is {block_k}; with tiles of {block_rows} rows it takes {stage} bytes of shared memory, and "
            f"{platform.name} has {platform.shared_bytes}: name a smaller one"
        )
    # Two thread blocks to a multiprocessor, unless that leaves one stage: then no load is ahead of its product.
    stages = platform.shared_bytes // (2 * stage)
    stages = max(1, min(most_stages, stages if stages > 1 else platform.shared_bytes // stage))
    return Tile(rows, parts, block_k, warps, stages, slices, registers)


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
