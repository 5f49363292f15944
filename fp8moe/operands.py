"""The quantized operands of the grouped GEMMs: FP8 data, its scales, and the memory layout both promise.

Shapes use the words of the whole package: `R` padded rows (the capacity of `TokenGroups`), `K` and `N` the features of
the forward GEMM, `D` the features of a token operand, `E` experts. Data is `torch.float8_e4m3fn`. A scale is the fp32
*dequantization* factor of one tile: `x ~= data.float() * scale`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

BLOCK = 128
"""Length of a quantization tile (1 x 128 for rows and tokens, 128 x 128 for weights) and row alignment of a group."""


def in_whole_blocks(size: int) -> int:
    """`size` rounded up to a multiple of 128: how long a dimension is that operands pad. Adds no guard to a trace."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


TMA_ALIGNMENT = 16
"""Bytes. What Hopper's tensor memory accelerator copies, and each row of it, must start at a multiple of it. All memory
that PyTorch allocates does, but not every view: a slice of a flat gradient buffer may start anywhere."""


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Which expert each row belongs to, and where it lies once every group is padded to a multiple of 128 rows.

    `M` ragged rows, as the caller has them, `R` padded rows (`capacity`), `E` groups. Shapes depend on `M` and
    `E` alone, never on the routing, so nothing here reads the device.
    """

    num_rows: int
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
        """The plan as a flat list: `TokenGroups(num_rows, *tensors)` is the same plan."""
        return [self.ends, self.padded_ends, self.row_expert, self.row_source, self.token_row]

    def gathering(self, row_source: Tensor | None) -> "TokenGroups":
        """The same plan for a quantization that reads other rows, such as the tokens that the ragged rows copy.

        Args:
            row_source: int32 `(R,)`: the row that each padded row copies, -1 on padding; None leaves the plan as it is.
        """
        if row_source is None:
            return self
        return TokenGroups(self.num_rows, self.ends, self.padded_ends, self.row_expert, row_source, self.token_row)

    @staticmethod
    def capacity_for(num_rows: int, num_groups: int) -> int:
        """The padded rows that suffice for any routing of `num_rows` rows to `num_groups` groups.

        At most `min(E, M)` groups hold a row, each of them pads by at most 127, and the sum is a multiple of 128.
        """
        padded_groups = torch.sym_min(num_groups, num_rows)  # as `min`, but no guard under torch.compile
        return (num_rows + (BLOCK - 1) * padded_groups) // BLOCK * BLOCK


@dataclass(frozen=True, eq=False)
class RowOperand:
    """Left side of forward and dgrad: rows padded group by group, quantized along their features.

    `K` is a multiple of 128: features past the last are zeros (NaN where their tile is). Padding rows inside a group
    are zeros. Rows past the last group are unspecified and never read into a result.
    """

    data: Tensor
    """e4m3 `(R, K)`, row-major."""
    stored_scale: Tensor
    """fp32 `(K/128, R)`, contiguous: one per 1 x 128 tile, MN-major, as TMA loads want it."""

    @property
    def scale(self) -> Tensor:
        """fp32 `(R, K/128)`, strides `(1, R)`."""
        return self.stored_scale.t()

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Contiguous tensors: `RowOperand(*tensors)` is the same operand."""
        return self.data, self.stored_scale

    @classmethod
    def empty(cls, capacity: int, num_features: int, device: torch.device) -> "RowOperand":
        """Uninitialized, in the promised layout, of rows of any number of features."""
        padded = in_whole_blocks(num_features)
        data = torch.empty(capacity, padded, dtype=torch.float8_e4m3fn, device=device)
        return cls(data, torch.empty(padded // BLOCK, capacity, dtype=torch.float32, device=device))


def data_and_scale(x: Tensor | RowOperand) -> tuple[Tensor, Tensor | None]:
    """Rows in high precision (which have no scale), or quantized, as operators and kernels take them."""
    return x.tensors if isinstance(x, RowOperand) else (x, None)


class TokenLayout(Enum):
    """How the groups of a token operand lie in memory."""

    SIDE_BY_SIDE = "side by side"
    """`(D, R)` row-major: one matrix, the groups next to each other along the tokens."""
    PER_EXPERT = "per expert"
    """Flat `(D * R,)`: for each expert in order a row-major `(D, M_e)` block, `M_e` its padded row count."""


@dataclass(frozen=True, eq=False)
class TokenOperand:
    """Either side of wgrad: feature-major, quantized along the tokens, so that the contraction is contiguous.

    `D` is any size: features are not padded. Tiles of `token_tile` tokens begin where an expert's rows begin; the last
    tile of an expert may be shorter. The scale of a tile of more than 128 tokens is stored once for each of its blocks
    of 128, so that a GEMM need not know how long the tiles are.
    """

    data: Tensor
    """e4m3 `(D, R)` or `(D * R,)`, as `layout` says."""
    stored_scale: Tensor
    """fp32 `(R/128, D)`, contiguous: one per 128 tokens of one feature."""
    layout: TokenLayout
    token_tile: int = BLOCK
    """Tokens that share one scale: 128, 256 or 512."""

    @property
    def scale(self) -> Tensor:
        """fp32 `(D, R/128)`, strides `(1, D)`."""
        return self.stored_scale.t()

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Contiguous tensors: `TokenOperand.of(tensors, layout, token_tile)` is the same operand."""
        return self.data, self.stored_scale

    @classmethod
    def empty(
        cls, capacity: int, num_features: int, layout: TokenLayout, device: torch.device, token_tile: int = BLOCK
    ) -> "TokenOperand":
        """Uninitialized, in the promised layout."""
        shape = (num_features, capacity) if layout is TokenLayout.SIDE_BY_SIDE else (num_features * capacity,)
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(capacity // BLOCK, num_features, dtype=torch.float32, device=device)
        return cls(data, scale, layout, token_tile)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layout: TokenLayout, token_tile: int = BLOCK) -> "TokenOperand":
        """The operand that has these `tensors`."""
        data, stored_scale = tensors
        return cls(data, stored_scale, layout, token_tile)


@dataclass(frozen=True, eq=False)
class LongTiles:
    """Tiles of 256 or 512 tokens, measured beforehand for a kernel that quantizes tokens but sees 128 at a time."""

    token_tile: int
    """256 or 512."""
    amax: Tensor
    """fp32 `(R/128, D)`, contiguous: for each block of 128 padded rows the largest magnitude in the tile that contains
    it, NaN if any element there is NaN; unspecified for blocks of no group."""


def empty_operands(
    capacity: int,
    num_features: int,
    rows: bool,
    tokens: TokenLayout | None,
    device: torch.device,
    token_tile: int = BLOCK,
) -> tuple[RowOperand | None, TokenOperand | None]:
    """The operands that are asked for, uninitialized, in the promised layouts."""
    return (
        RowOperand.empty(capacity, num_features, device) if rows else None,
        TokenOperand.empty(capacity, num_features, tokens, device, token_tile) if tokens else None,
    )


def tensors_of(*operands: RowOperand | TokenOperand | None) -> list[Tensor]:
    """The contiguous tensors of all operands that are not None."""
    return [tensor for operand in operands if operand for tensor in operand.tensors]


@dataclass(frozen=True, eq=False)
class WeightOperand:
    """Right side of forward `(E, N, K)` or dgrad `(E, K, N)`: the last dimension is contracted and contiguous.

    `N` and `K` are multiples of 128: what is added to the weight's own sizes is zeros (NaN where their block is). Of
    several weights that lie side by side along `N`, each is padded by itself.
    """

    data: Tensor
    """e4m3 `(E, N, K)` for the forward GEMM, `(E, K, N)` for dgrad; contiguous."""
    scale: Tensor
    """fp32 `(E, N/128, K/128)`, one per 128 x 128 block; for dgrad the same numbers, viewed transposed."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """`WeightOperand(*tensors)` is the same operand."""
        return self.data, self.scale
