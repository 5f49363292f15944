"""TokenGroups: from `offs` to the plan that quantization and all three GEMMs share, without leaving the device."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.operands import BLOCK
from fp8moe.torch_op import torch_op

MAX_GROUPS_IN_KERNEL = 1024
"""Each program of the planning kernel holds all ends in registers; far beyond this they spill."""


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Which expert each row belongs to, and where it lies once every group is padded to a multiple of 128 rows.

    `M` tokens (ragged rows, as the caller has them), `R` padded rows (`capacity`), `E` groups. Shapes depend on `M` and
    `E` alone, never on the routing, so nothing here reads the device; only `group_sizes_on_host` does.
    """

    num_tokens: int
    """`M`."""
    ends: Tensor
    """int32 `(E,)`: end of each group among the ragged rows; non-decreasing, at most `M`."""
    padded_ends: Tensor
    """int32 `(E,)`: end of each group among the padded rows; multiples of 128, at most `R`."""
    row_expert: Tensor
    """int32 `(R,)`: the expert of each padded row; -1 on padding and past the last group."""
    row_source: Tensor
    """int32 `(R,)`: the ragged row that each padded row copies; -1 on padding and past the last group."""
    token_row: Tensor
    """int32 `(M,)`: where each ragged row lies among the padded rows; -1 past the last group."""

    @property
    def num_groups(self) -> int:
        """`E`."""
        return self.ends.shape[0]

    @property
    def capacity(self) -> int:
        """`R`, the static number of padded rows."""
        return self.row_source.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The plan as a flat list: `TokenGroups(num_tokens, *tensors)` is the same plan."""
        return [self.ends, self.padded_ends, self.row_expert, self.row_source, self.token_row]

    def gathering(self, row_source: Tensor | None) -> "TokenGroups":
        """The same plan, but that quantization reads other rows: those of tokens, say, which the ragged rows only copy.

        Args:
            row_source: int32 `(R,)`: the row that each padded row copies, -1 on padding; None leaves the plan as it is.
        """
        return self if row_source is None else replace(self, row_source=row_source)

    @cached_property
    def group_sizes_on_host(self) -> list[int]:
        """Rows of each group as Python integers. Reads the device, so it waits for all work queued there: on CUDA
        use it only where a kernel truly needs host sizes."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1)).tolist()

    @staticmethod
    def capacity_for(num_tokens: int, num_groups: int) -> int:
        """The padded rows that suffice for any routing of `num_tokens` rows to `num_groups` groups.

        At most `min(E, M)` groups hold a row, each of them pads by at most 127, and the sum is a multiple of 128.
        """
        padded_groups = torch.sym_min(num_groups, num_tokens)  # as `min`, but no guard under torch.compile
        return (num_tokens + (BLOCK - 1) * padded_groups) // BLOCK * BLOCK

    @classmethod
    def from_offs(cls, offs: Tensor, num_tokens: int) -> "TokenGroups":
        """Plan the groups that end at `offs` among `num_tokens` rows.

        Offsets that decrease or pass `num_tokens` are a caller's mistake that only the device can see. They are raised
        to the running maximum and cut at `num_tokens`, so that they can never make a kernel read out of bounds.

        Args:
            offs: int32 `(E,)`, `E >= 1`, end row of each group, as in `torch.nn.functional.grouped_mm`.
            num_tokens: `M`, rows of the activation; rows from `offs[-1]` on belong to no group.
        """
        return cls(num_tokens, *_plan_groups(offs, num_tokens))


def ends_within(offs: Tensor, num_tokens: int) -> Tensor:
    """The `ends` of `TokenGroups` alone: `offs` with what is wrong in it mended."""
    return _ends_within(offs, num_tokens)


def ends_by_cummax(offs: Tensor, num_tokens: int) -> Tensor:
    """`ends_within` in plain PyTorch: the definition. Cut at `num_tokens`, raised to the running maximum."""
    return offs.clamp(0, num_tokens).cummax(0).values


def plan_by_bucketize(offs: Tensor, num_tokens: int) -> list[Tensor]:
    """The tensors of `TokenGroups` in plain PyTorch: the definition."""
    (num_groups,) = offs.shape
    ends = ends_by_cummax(offs, num_tokens)
    starts = F.pad(ends, (1, -1))
    padded_sizes = (ends - starts + (BLOCK - 1)) & -BLOCK
    padded_ends = padded_sizes.cumsum(0, dtype=torch.int32)
    padded_starts = padded_ends - padded_sizes
    shifts = padded_starts - starts  # padded row minus ragged row, the same for all rows of a group

    rows = torch.arange(TokenGroups.capacity_for(num_tokens, num_groups), dtype=torch.int32, device=offs.device)
    expert = torch.bucketize(rows, padded_ends, right=True, out_int32=True)  # E past the last group
    group = expert.clamp(max=num_groups - 1)
    source = rows - shifts[group]
    live = (expert < num_groups) & (source < ends[group])

    tokens = torch.arange(num_tokens, dtype=torch.int32, device=offs.device)
    token_expert = torch.bucketize(tokens, ends, right=True, out_int32=True)
    token_row = tokens + shifts[token_expert.clamp(max=num_groups - 1)]
    return [
        ends,
        padded_ends,
        torch.where(live, expert, -1),
        torch.where(live, source, -1),
        torch.where(token_expert < num_groups, token_row, -1),
    ]


def _empty_ends(offs: Tensor, num_tokens: int) -> Tensor:
    return offs.new_empty(offs.shape)


@torch_op(fake=_empty_ends)
def _ends_within(offs: Tensor, num_tokens: int) -> Tensor:
    if runs_triton(offs.device):
        from fp8moe.groups_kernel import launch_ends_within

        ends = _empty_ends(offs, num_tokens)
        launch_ends_within(offs.contiguous(), num_tokens, ends)
        return ends
    return ends_by_cummax(offs, num_tokens)


def _empty_plan(offs: Tensor, num_tokens: int) -> list[Tensor]:
    num_groups = offs.shape[0]
    capacity = TokenGroups.capacity_for(num_tokens, num_groups)
    return [offs.new_empty(size) for size in (num_groups, num_groups, capacity, capacity, num_tokens)]


@torch_op(fake=_empty_plan)
def _plan_groups(offs: Tensor, num_tokens: int) -> list[Tensor]:
    if runs_triton(offs.device) and offs.shape[0] <= MAX_GROUPS_IN_KERNEL:
        from fp8moe.groups_kernel import launch_plan_groups

        plan = _empty_plan(offs, num_tokens)
        launch_plan_groups(offs.contiguous(), num_tokens, plan)
        return plan
    return plan_by_bucketize(offs, num_tokens)
