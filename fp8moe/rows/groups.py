"""From `offs` to `TokenGroups`, the plan that quantization and all three GEMMs share, without leaving the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.operands import BLOCK, TokenGroups
from fp8moe.torch_op import torch_op

MAX_ROWS = 2**31 - 1
"""Rows are numbered in int32."""
MAX_GROUPS_IN_KERNEL = 1024
"""Each program of the planning kernel holds all ends in registers; far beyond this they spill."""


def plan_groups(offs: Tensor, num_rows: int) -> TokenGroups:
    """Plan the groups that end at `offs` among `num_rows` rows.

    Offsets that decrease or pass `num_rows` are a caller's mistake that only the device can see. They are raised to the
    running maximum and cut at `num_rows`, so that they can never make a kernel read out of bounds.

    Args:
        offs: int32 `(E,)`, `E >= 1`, end row of each group, as in `torch.nn.functional.grouped_mm`.
        num_rows: `M`, rows of the activation; rows from `offs[-1]` on belong to no group.

    Raises:
        ValueError: there are too many rows for an int32. Raised when the operator runs: a check in a trace would fix
            the sizes.
    """
    return TokenGroups(num_rows, *_plan_groups(offs, num_rows))


def check_num_rows(num_rows: int, num_groups: int) -> None:
    """The numbers of all padded rows must fit into int32."""
    if num_rows + BLOCK * num_groups > MAX_ROWS:
        raise ValueError(
            f"there are {num_rows} rows in {num_groups} groups; with padding they must be at most {MAX_ROWS}: split "
            "the batch"
        )


def ends_by_cummax(offs: Tensor, num_rows: int) -> Tensor:
    """`ends_within` in plain PyTorch: the definition. Cut at `num_rows`, raised to the running maximum."""
    return offs.clamp(0, num_rows).cummax(0).values


def plan_by_bucketize(offs: Tensor, num_rows: int) -> list[Tensor]:
    """The tensors of `TokenGroups` in plain PyTorch: the definition."""
    (num_groups,) = offs.shape
    ends = ends_by_cummax(offs, num_rows)
    starts = F.pad(ends, (1, -1))
    padded_sizes = (ends - starts + (BLOCK - 1)) & -BLOCK
    padded_ends = padded_sizes.cumsum(0, dtype=torch.int32)
    padded_starts = padded_ends - padded_sizes
    shifts = padded_starts - starts  # padded row minus ragged row, the same for all rows of a group

    rows = torch.arange(TokenGroups.capacity_for(num_rows, num_groups), dtype=torch.int32, device=offs.device)
    expert = torch.bucketize(rows, padded_ends, right=True, out_int32=True)  # E past the last group
    group = expert.clamp(max=num_groups - 1)
    source = rows - shifts[group]
    live = (expert < num_groups) & (source < ends[group])

    tokens = torch.arange(num_rows, dtype=torch.int32, device=offs.device)
    token_expert = torch.bucketize(tokens, ends, right=True, out_int32=True)
    token_row = tokens + shifts[token_expert.clamp(max=num_groups - 1)]
    return [
        ends,
        padded_ends,
        torch.where(live, expert, -1),
        torch.where(live, source, -1),
        torch.where(token_expert < num_groups, token_row, -1),
    ]


def _empty_ends(offs: Tensor, num_rows: int) -> Tensor:
    return offs.new_empty(offs.shape)


@torch_op(fake=_empty_ends, of_integers=True)
def ends_within(offs: Tensor, num_rows: int) -> Tensor:
    """The `ends` of `TokenGroups` alone: `offs`, with wrong offsets corrected as in `plan_groups`."""
    if runs_triton(offs.device):
        from fp8moe.kernels.groups import launch_ends_within

        ends = _empty_ends(offs, num_rows)
        launch_ends_within(offs.contiguous(), num_rows, ends)
        return ends
    return ends_by_cummax(offs, num_rows)


def ends_of(offs: Tensor, num_rows: int, full: bool) -> Tensor:
    """`ends_within`; if the caller promises that it would change nothing (`FP8Config.assume_full`), `offs` itself."""
    return offs.contiguous() if full else ends_within(offs, num_rows)


def _empty_plan(offs: Tensor, num_rows: int) -> list[Tensor]:
    num_groups = offs.shape[0]
    capacity = TokenGroups.capacity_for(num_rows, num_groups)
    sizes = (num_groups, num_groups, capacity, capacity, num_rows)
    return [torch.empty(size, dtype=torch.int32, device=offs.device) for size in sizes]


@torch_op(fake=_empty_plan, of_integers=True)
def _plan_groups(offs: Tensor, num_rows: int) -> list[Tensor]:
    check_num_rows(num_rows, offs.shape[0])
    if runs_triton(offs.device) and offs.shape[0] <= MAX_GROUPS_IN_KERNEL:
        from fp8moe.kernels.groups import launch_plan_groups

        plan = _empty_plan(offs, num_rows)
        launch_plan_groups(offs.contiguous(), num_rows, plan)
        return plan
    return plan_by_bucketize(offs, num_rows)
