"""One row of the kernel table, checked and held to its floor."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.ceilings import Moved
from fp8moe.config import KernelPreference
from fp8moe.gemm.base import GroupedGemm
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand
from fp8moe.quantize import reference

SECTOR_BYTES = 32
"""What memory gives at least."""
Check = tuple[str, Tensor, Tensor]
"""What is compared, what it is, what it must be."""


@dataclass(frozen=True)
class Kernel:
    """One call of the library."""

    name: str
    run: Callable[[], Any]
    moves: Callable[[Any], Iterable[Moved]]
    """What it reads and writes, of the result of `run`."""
    checks: Callable[[Any], Iterable[Check]]
    """What must hold of the result of `run`."""
    flops: int = 0
    is_bf16: bool = False
    """PyTorch's, for comparison."""


def backends_of(preferences: set[KernelPreference]) -> dict[KernelPreference, GroupedGemm]:
    """The backends of these preferences, in the order of `BACKENDS`."""
    return {preference: backend for preference, backend in BACKENDS.items() if preference in preferences}


def token_layouts(preferences: set[KernelPreference]) -> list[TokenLayout]:
    """The layouts that these backends take; one if there are no backends."""
    layouts = dict.fromkeys(backend.token_layout for backend in backends_of(preferences).values())
    return list(layouts) or [TokenLayout.SIDE_BY_SIDE]


def of_tiles(token_tile: int) -> str:
    """What the name of a row with such token tiles ends in."""
    return "" if token_tile == BLOCK else f", tiles of {token_tile}"


def sectors_of_every(every: int, x: Tensor) -> Tensor:
    """As many bytes, and no data, as reading each `every`-th column of contiguous `x` moves: a sector of 32 bytes for
    each element, where they lie further apart than that."""
    num_rows, num_columns = x.shape
    looked_at = len(range(0, num_columns, every))
    num_bytes = num_rows * looked_at * min(SECTOR_BYTES, every * x.element_size())
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def row_check(rows: RowOperand, groups: TokenGroups, x: Tensor) -> Check:
    """A row operand must hold `x` `(M, K)`, and zeros past its features."""
    held = reference.dequantize_rows(rows)[groups.token_row]
    return "rows", held, F.pad(x.float(), (0, held.shape[1] - x.shape[1]))


def token_check(tokens: TokenOperand, groups: TokenGroups, x: Tensor, name: str = "tokens") -> Check:
    """A token operand must hold `x` `(M, K)`, transposed."""
    return name, reference.dequantize_tokens(tokens, groups)[:, groups.token_row].t(), x.float()
