"""Kernel: from group offsets and choices to all that the steps of a layer ask of them, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.groups import bounds_of_groups
from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from

ELEMENTS = 4096  # compared at once by a program: tiles times experts
CHOICES = 256  # placed by a program


@triton.jit
def plan_tiles_kernel(
    offsets,  # int32 (E,)
    ends, largest, tile_expert, tile_row,  # as in `RowTiles`
    choice_row, topk_weights,  # (T, k) contiguous or None
    row_token, row_weights,  # (M,)
    M, E, TILES, choices, k,
    BLOCK_M: tl.constexpr, PLANNED: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """One program plans PLANNED tiles and places CHOICES choices. EXPERTS is at least E."""
    expert = tl.arange(0, EXPERTS)
    start, end = bounds_of_groups(offsets, expert, M, E)
    size = tl.where(expert < E, end - start, 0)
    tile_count = (size + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tile_count, axis=0)  # the one after it
    if tl.program_id(0) == 0:
        tl.store(ends + expert, end, mask=expert < E)
        tl.store(largest, tl.max(size, axis=0))

    tile = tl.program_id(0) * PLANNED + tl.arange(0, PLANNED)
    ended = (last_tile[None, :] <= tile[:, None]) & (expert < E)[None, :]
    own = tl.sum(ended.to(tl.int32), axis=1)
    is_own = expert[None, :] == own[:, None]
    before = tl.sum(tl.where(ended, tile_count[None, :], 0), axis=1)
    row = tl.sum(tl.where(is_own, start[None, :], 0), axis=1) + (tile - before) * BLOCK_M
    tl.store(tile_expert + tile, tl.where(own < E, own, -1), mask=tile < TILES)
    tl.store(tile_row + tile, tl.where(own < E, row, M), mask=tile < TILES)

    if choice_row is not None:
        choice = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
        placed = tl.load(choice_row + choice, mask=choice < choices, other=-1)
        tl.store(row_token + placed, choice // k, mask=placed >= 0)
        weight = tl.load(topk_weights + choice, mask=placed >= 0, other=0.0).to(tl.float32)
        tl.store(row_weights + placed, weight, mask=placed >= 0)


def launch_plan_tiles(
    offsets: Tensor, num_rows: int, block_rows: int, tiles: list[Tensor],
    choice_row: Tensor | None, topk_weights: Tensor | None, maps: list[Tensor],
) -> None:  # fmt: skip
    """Fill `tiles`, the tensors of a `RowTiles`, and with choices the `maps` from rows to tokens and weights."""
    num_experts, num_tiles = offsets.shape[0], tiles[2].shape[0]
    experts = power_of_2_from(num_experts)
    planned = max(ELEMENTS // experts, 1)
    choices, k = (0, 1) if choice_row is None else (choice_row.numel(), choice_row.shape[1])
    blocks = max(ceil_div(num_tiles, planned), ceil_div(choices, CHOICES), 1)
    row_token, row_weights = maps or (None, None)
    launch(
        plan_tiles_kernel, blocks, offsets, *tiles, choice_row, topk_weights, row_token, row_weights,
        num_rows, num_experts, num_tiles, choices, k,
        BLOCK_M=block_rows, PLANNED=planned, EXPERTS=experts, CHOICES=CHOICES,
    )  # fmt: skip
