"""Kernel: the sum of each token's rows, each read once."""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import Variant, ceil_div, tile_of

ELEMENTS = 1024  # of a program's tile: 16 bytes of bf16 a thread and row
MAX_IN_FLIGHT = 8  # rows that are loaded before the first is added


@triton.jit
def combine_kernel(
    rows,  # (rows, H), features contiguous
    choice_row,  # int32 (T, k) contiguous
    out,  # (T, H), features contiguous
    stride_row, stride_out, T, H,
    CHOICES: tl.constexpr, IN_FLIGHT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program sums TOKENS tokens x COLUMNS columns; CHOICES is k."""
    column_blocks = tl.cdiv(H, COLUMNS)
    token = (tl.program_id(0) // column_blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < T)[:, None] & (column < H)[None, :]
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, CHOICES, IN_FLIGHT):
        chosen, values = (), ()
        for i in tl.static_range(IN_FLIGHT):
            some = (token < T) & (first + i < CHOICES)
            chosen = chosen + (tl.load(choice_row + token * CHOICES + first + i, mask=some, other=-1),)
        for i in tl.static_range(IN_FLIGHT):
            row = chosen[i][:, None].to(tl.int64)
            values = values + (tl.load(rows + row * stride_row + column[None, :], mask=inside & (row >= 0), other=0.0),)
        for i in tl.static_range(IN_FLIGHT):
            # What is masked adds 0.0, which changes no bit: a sum that began at 0.0 is never -0.0.
            total += values[i].to(tl.float32)
    tl.store(out + token[:, None] * stride_out + column[None, :], total, mask=inside)


def launch_combine(rows: Tensor, choice_row: Tensor, out: Tensor) -> None:
    """`out[t]` is the sum of `rows[choice_row[t, j]]` over `j`, without those of -1. Features are contiguous."""
    num_tokens, num_columns = out.shape
    variant, tokens, columns = _variant(choice_row.shape[1], num_columns)
    if num_tokens:
        blocks = ceil_div(num_tokens, tokens) * ceil_div(num_columns, columns)
        variant.launch(blocks, rows, choice_row, out, rows.stride(0), out.stride(0), num_tokens, num_columns)


@cache
def _variant(choices: int, num_columns: int) -> tuple[Variant, int, int]:
    tokens, columns = tile_of(num_columns, ELEMENTS)
    constants = {"CHOICES": choices, "IN_FLIGHT": min(choices, MAX_IN_FLIGHT), "TOKENS": tokens, "COLUMNS": columns}
    return Variant(combine_kernel, **constants, num_warps=4), tokens, columns
