"""Which tiles of rows the products compute, planned once on the device for all steps of a layer.

One pass over the offsets gives the end of each group, its tiles and the size of the largest group, in one launch, and
nothing reads them on the host: the total of rows bounds the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.int8.checks import check_vector
from fp8moe.rows.groups import MAX_GROUPS_IN_KERNEL, MAX_ROWS, ends_by_cummax
from fp8moe.torch_op import torch_op

BLOCK_ROWS = (4, 8, 16, 32, 64, 128)
"""Rows that a tile may have."""


@dataclass(frozen=True, eq=False)
class RowTiles:
    """The tiles of `block_rows` rows in which groups are computed, each of one group, and what else is known of those.

    Shapes depend on the numbers of rows and groups alone, so a CUDA graph may be replayed with other groups.
    """

    num_rows: int
    """`M`."""
    block_rows: int
    """One of `BLOCK_ROWS`."""
    ends: Tensor
    """int32 `(E,)`: end of each group; non-decreasing, at most `M`."""
    largest: Tensor
    """int32 `(1,)`: rows of the largest group."""
    expert: Tensor
    """int32 `(tiles,)`: whose rows a tile has; -1 for those that this routing does not need."""
    row: Tensor
    """int32 `(tiles,)`: the first row of each tile; it has as many as its group has left, `block_rows` at most."""

    @property
    def tensors(self) -> list[Tensor]:
        """`RowTiles.of(num_rows, block_rows, tensors)` is the same plan."""
        return [self.ends, self.largest, self.expert, self.row]

    @classmethod
    def of(cls, num_rows: int, block_rows: int, tensors: Sequence[Tensor]) -> "RowTiles":
        """The plan that has these `tensors`."""
        ends, largest, expert, row = tensors
        return cls(num_rows, block_rows, ends, largest, expert, row)

    @cached_property
    def largest_on_host(self) -> int:
        """Rows of the largest group. Asking for the first time waits for the device; nothing in this package asks."""
        return int(self.largest)

    @staticmethod
    def count_for(num_rows: int, num_groups: int, block_rows: int) -> int:
        """The tiles that suffice for any groups: each that has rows has at most one tile that is not full."""
        groups = min(num_groups, num_rows)
        return (num_rows + (block_rows - 1) * groups) // block_rows


def fewest_rows(tiled: bool) -> int:
    """Of a tile: matrix units take 8. But 4 are enough where each is multiplied as several, for its many scales."""
    return 4 if tiled else 8


def most_rows(weight_bits: int, tiled: bool) -> int:
    """Of a tile: fewer where a thread has more sums to keep, those of two operands that INT4 unpacks to, or those that
    wait for the scale of their tile of a row."""
    return 64 if tiled or weight_bits == 4 else 128


def block_rows_for(num_rows: int, num_groups: int, weight_bits: int, tiled: bool) -> int:
    """Rows of a tile that suits groups of the average size: of those that have rows if there are few."""
    average = num_rows / max(1, min(num_rows, num_groups))
    fewest, most = fewest_rows(tiled), most_rows(weight_bits, tiled)
    return next(rows for rows in BLOCK_ROWS if rows >= fewest and (average <= rows or rows == most))


def plan_tiles(
    offsets: Tensor, num_rows: int, block_rows: int | None = None, weight_bits: int = 8, tiled: bool = False
) -> RowTiles:
    """Plan the tiles of groups that end at `offsets` among `num_rows` rows.

    Offsets that decrease or pass `num_rows` are corrected as in `fp8moe.grouped_mm`, so that no kernel reads out of
    bounds.

    Args:
        offsets: int32 `(E,)`, `E >= 1`: end row of each group.
        num_rows: `M`.
        block_rows: one of `BLOCK_ROWS`; None: what suits groups of the average size.
        weight_bits: of the weight that the rows will meet, 8 or 4.
        tiled: whether a row has several scales (`a_tile`).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or size.
    """
    check_vector(offsets, "offsets", max(offsets.numel(), 1), torch.int32, offsets, "offsets")
    if block_rows is None:
        block_rows = block_rows_for(num_rows, offsets.shape[0], weight_bits, tiled)
    if block_rows not in BLOCK_ROWS:
        raise ValueError(f"block_rows is {block_rows!r}; it must be one of {', '.join(map(str, BLOCK_ROWS))}")
    return RowTiles.of(num_rows, block_rows, _int8_plan_tiles(offsets, num_rows, block_rows, None, None))


def plan_choices(
    ends: Tensor, choice_row: Tensor, topk_weights: Tensor, weight_bits: int, tiled: bool
) -> tuple[RowTiles, Tensor, Tensor]:
    """The tiles of the rows of choices, and for each row its token (int32) and its choice's weight (fp32).

    Args:
        ends, choice_row: as of `fp8moe.rows.routing.route_choices`.
        topk_weights: `(T, k)`.
        weight_bits, tiled: as in `plan_tiles`.
    """
    num_rows = choice_row.numel()
    block_rows = block_rows_for(num_rows, ends.shape[0], weight_bits, tiled)
    *tiles, row_token, row_weights = _int8_plan_tiles(ends, num_rows, block_rows, choice_row, topk_weights)
    return RowTiles.of(num_rows, block_rows, tiles), row_token, row_weights


def tiles_by_bucketize(offsets: Tensor, num_rows: int, block_rows: int) -> list[Tensor]:
    """The tensors of `RowTiles` in plain PyTorch: the definition."""
    ends = ends_by_cummax(offsets, num_rows)
    starts = F.pad(ends, (1, -1))
    counts = (ends - starts + (block_rows - 1)) // block_rows
    tile_ends = counts.cumsum(0, dtype=torch.int32)
    num_groups = offsets.shape[0]
    count = RowTiles.count_for(num_rows, num_groups, block_rows)
    tiles = torch.arange(count, dtype=torch.int32, device=offsets.device)
    expert = torch.bucketize(tiles, tile_ends, right=True, out_int32=True)
    own = expert.clamp(max=num_groups - 1)
    row = starts[own] + (tiles - (tile_ends - counts)[own]) * block_rows
    live = expert < num_groups
    return [ends, (ends - starts).max()[None], torch.where(live, expert, -1), torch.where(live, row, num_rows)]


def maps_by_index(choice_row: Tensor, topk_weights: Tensor) -> list[Tensor]:
    """For each row the token and the weight of its choice, in plain PyTorch: the definition. Rows of no choice: 0."""
    placed = choice_row >= 0
    token, _ = torch.where(placed)
    rows = choice_row[placed].long()
    row_token = torch.zeros(choice_row.numel(), dtype=torch.int32, device=choice_row.device)
    row_weights = torch.zeros(choice_row.numel(), device=choice_row.device)
    return [row_token.index_copy_(0, rows, token.int()), row_weights.index_copy_(0, rows, topk_weights[placed].float())]


def _empty_plan(
    offsets: Tensor, num_rows: int, block_rows: int, choice_row: Tensor | None, topk_weights: Tensor | None
) -> list[Tensor]:
    num_groups, device = offsets.shape[0], offsets.device
    tiles = RowTiles.count_for(num_rows, num_groups, block_rows)
    plan = [torch.empty(size, dtype=torch.int32, device=device) for size in (num_groups, 1, tiles, tiles)]
    if choice_row is not None:
        plan += [torch.empty(num_rows, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32)]
    return plan


@torch_op(fake=_empty_plan, of_integers=True)  # and of weights without their gradients
def _int8_plan_tiles(
    offsets: Tensor, num_rows: int, block_rows: int, choice_row: Tensor | None, topk_weights: Tensor | None
) -> list[Tensor]:
    if num_rows > MAX_ROWS:
        raise ValueError(f"there are {num_rows} rows; they must be at most {MAX_ROWS}: split the batch")
    if runs_triton(offsets.device) and offsets.shape[0] <= MAX_GROUPS_IN_KERNEL:
        from fp8moe.kernels.int8.groups import launch_plan_tiles

        plan = _empty_plan(offsets, num_rows, block_rows, choice_row, topk_weights)
        choices = None if choice_row is None else choice_row.contiguous()
        weights = None if topk_weights is None else topk_weights.contiguous()
        launch_plan_tiles(offsets.contiguous(), num_rows, block_rows, plan[:4], choices, weights, plan[4:])
        return plan
    tiles = tiles_by_bucketize(offsets, num_rows, block_rows)
    return tiles if choice_row is None or topk_weights is None else tiles + maps_by_index(choice_row, topk_weights)
