"""Kernel: each token to its rows, read once."""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import Variant, ceil_div, tile_of

ELEMENTS = 1024  # of a program's tile: 16 bytes of bf16 a thread


@triton.jit
def spread_kernel(
    tokens,  # (T, H) contiguous
    choice_row,  # int32 (T, k) contiguous
    rows,  # (rows, H) contiguous
    T, H,
    CHOICES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program copies TOKENS tokens x COLUMNS columns; CHOICES is k."""
    column_blocks = tl.cdiv(H, COLUMNS)
    token = (tl.program_id(0) // column_blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < T)[:, None] & (column < H)[None, :]
    values = tl.load(tokens + token[:, None] * H + column[None, :], mask=inside)
    for choice in range(CHOICES):
        row = tl.load(choice_row + token * CHOICES + choice, mask=token < T, other=-1)[:, None].to(tl.int64)
        tl.store(rows + row * H + column[None, :], values, mask=inside & (row >= 0))


def launch_spread(tokens: Tensor, choice_row: Tensor, rows: Tensor) -> None:
    """`rows[choice_row[t, j]] = tokens[t]`, but for those of -1."""
    num_tokens, num_columns = tokens.shape
    variant, per_program, columns = _variant(choice_row.shape[1], num_columns)
    if num_tokens:
        blocks = ceil_div(num_tokens, per_program) * ceil_div(num_columns, columns)
        variant.launch(blocks, tokens, choice_row, rows, num_tokens, num_columns)


@cache
def _variant(choices: int, num_columns: int) -> tuple[Variant, int, int]:
    tokens, columns = tile_of(num_columns, ELEMENTS)
    return Variant(spread_kernel, CHOICES=choices, TOKENS=tokens, COLUMNS=columns, num_warps=4), tokens, columns
