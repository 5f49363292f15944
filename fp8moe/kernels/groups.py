"""Kernels: the whole plan of `TokenGroups` in one launch (PyTorch takes 27, 0.2 ms of an H200's host), and its ends."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from

ELEMENTS = 4096  # compared at once by a program: rows times experts
ENDS = 256  # corrected at once


@triton.jit
def running_maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def bounds_of_groups(offs, expert, M, E):
    """int32 each: start and end of the groups `expert`, that do not decrease and lie in 0..M whatever `offs` says. All
    groups must be asked for at once; those from E on are empty."""
    end = tl.load(offs + expert, mask=expert < E, other=0)
    end = tl.associative_scan(tl.minimum(tl.maximum(end, 0), M), 0, running_maximum)
    start = tl.load(offs + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    start = tl.associative_scan(tl.minimum(tl.maximum(start, 0), M), 0, running_maximum)
    return start, end


@triton.jit
def plan_groups_kernel(
    offs,  # int32 (E,)
    ends, padded_ends, row_expert, row_source, token_row,  # as in TokenGroups
    M, R, E,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program plans ROWS padded rows and ROWS ragged rows, and reads all of `offs`. EXPERTS is at least E."""
    expert = tl.arange(0, EXPERTS)
    start, end = bounds_of_groups(offs, expert, M, E)
    size = tl.where(expert < E, end - start, 0)
    padded_size = (size + 127) // 128 * 128
    padded_end = tl.cumsum(padded_size, axis=0)
    if tl.program_id(0) == 0:
        tl.store(ends + expert, end, mask=expert < E)
        tl.store(padded_ends + expert, padded_end, mask=expert < E)

    # The padding before a row is that of all groups that end before it: the distance between the two layouts.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ended = (padded_end[None, :] <= row[:, None]) & (expert < E)[None, :]
    group = tl.sum(ended.to(tl.int32), axis=1)
    source = row - tl.sum(tl.where(ended, (padded_size - size)[None, :], 0), axis=1)
    group_end = tl.sum(tl.where(expert[None, :] == group[:, None], end[None, :], 0), axis=1)
    live = (group < E) & (source < group_end)
    tl.store(row_expert + row, tl.where(live, group, -1), mask=row < R)
    tl.store(row_source + row, tl.where(live, source, -1), mask=row < R)

    token_ended = (end[None, :] <= row[:, None]) & (expert < E)[None, :]
    token_group = tl.sum(token_ended.to(tl.int32), axis=1)
    padded = row + tl.sum(tl.where(token_ended, (padded_size - size)[None, :], 0), axis=1)
    tl.store(token_row + row, tl.where(token_group < E, padded, -1), mask=row < M)


@triton.jit
def ends_within_kernel(
    offs,  # int32 (E,)
    ends,  # as in TokenGroups
    M, E,
    ENDS: tl.constexpr,
):  # fmt: skip
    """One program corrects all offsets, ENDS of them at a time."""
    last = 0
    for first in range(0, E, ENDS):
        expert = first + tl.arange(0, ENDS)
        end = tl.load(offs + expert, mask=expert < E, other=0)
        end = tl.associative_scan(tl.minimum(tl.maximum(end, last), M), 0, running_maximum)
        tl.store(ends + expert, end, mask=expert < E)
        last = tl.max(end, axis=0)


def launch_ends_within(offs: Tensor, num_rows: int, ends: Tensor) -> None:
    """Fill `ends` from `offs`, both contiguous."""
    launch(ends_within_kernel, 1, offs, ends, num_rows, ends.shape[0], ENDS=ENDS)


def launch_plan_groups(offs: Tensor, num_rows: int, plan: list[Tensor]) -> None:
    """Fill `plan`, the tensors of a `TokenGroups`, from contiguous `offs`."""
    ends, _, row_expert, _, _ = plan
    experts = power_of_2_from(ends.shape[0])
    rows = max(ELEMENTS // experts, 1)
    capacity = row_expert.shape[0]
    blocks = max(ceil_div(capacity, rows), 1)  # at least one, for the ends; padded rows are at least as many as rows
    launch(plan_groups_kernel, blocks, offs, *plan, num_rows, capacity, ends.shape[0], ROWS=rows, EXPERTS=experts)
