"""The definition of quantization, in plain PyTorch, bit for bit; every kernel must equal it exactly.

For one tile (1 x 128, or 128 x 128 for weights), in fp32 with correctly rounded divisions:

    amax  = max(max|x|, 2**-100)
    FP32:   scale = amax / 448,                        q = e4m3(clamp(x * (448 / amax), -448, 448))
    POW2:   scale = amax / 448 up to a power of two,   q = e4m3(clamp(x / scale, -448, 448))

`e4m3` rounds to nearest even. A tile whose amax is NaN or infinite is NaN as a whole: scale 0x7FC00000, data 0x7F.
A tile of 256 or 512 tokens whose amax is below 2**-60 is zeros (signed as its elements), with a scale of 1: wgrad
carries its sums in units of the tile's scale, and would overflow if that were tiny.
Where a size is no multiple of 128, the last tile of rows and weights is filled up with zeros.
This is the recipe of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), with the floor and the NaN rule made explicit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups, TokenLayout, TokenOperand, WeightOperand

E4M3_MAX = 448.0
AMAX_FLOOR = 2.0**-100
LONG_TILE_FLOOR = 2.0**-60
E4M3_NAN_BITS = 0x7F
FP32_MANTISSA_MASK = 0x7FFFFF


def round_up_to_power_of_two(x: Tensor) -> Tensor:
    """The smallest powers of two that are not below `x` (fp32, positive, normal), by their bits: no `log2` rounding."""
    bits = x.view(torch.int32)
    return ((bits + FP32_MANTISSA_MASK) & ~FP32_MANTISSA_MASK).view(torch.float32)


def quantize_tiles(x: Tensor, tile_dims: tuple[int, ...], scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Quantize `x` with one scale for each index outside `tile_dims`.

    Args:
        x: fp32, any shape.
        tile_dims: the dimensions that lie within one tile.
        scale_format: as in `FP8Config`.

    Returns:
        data: e4m3, the shape of `x`.
        scale: fp32, the shape of `x` with 1 in `tile_dims`.
    """
    return quantize_with_amax(x, x.abs().amax(tile_dims, keepdim=True), scale_format)


def quantize_with_amax(x: Tensor, amax: Tensor, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` by maxima that are known already, fp32, of the shape of the scales."""
    finite = amax.isfinite()
    amax = torch.where(finite, amax, 1.0).clamp(min=AMAX_FLOOR)
    # Divide tensor by tensor: with a Python scalar PyTorch multiplies by a rounded reciprocal instead.
    e4m3_max = torch.full_like(amax, E4M3_MAX)
    scale = amax / e4m3_max
    if scale_format is ScaleFormat.POW2:
        scale = round_up_to_power_of_two(scale)
        scaled = x / scale
    else:
        scaled = x * (e4m3_max / amax)
    # PyTorch up to 2.11 casts what overflows to NaN, later versions saturate: clamp first, so that both agree.
    data = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    data_bits = torch.where(finite, data.view(torch.uint8), E4M3_NAN_BITS)
    return data_bits.view(torch.float8_e4m3fn), torch.where(finite, scale, torch.nan)


def gather_padded_rows(x: Tensor, groups: TokenGroups) -> Tensor:
    """`(M, K)` in any float dtype to fp32 `(R, K)`: every group at its padded place, zeros on padding."""
    padding = groups.row_source < 0
    return x[groups.row_source.clamp(min=0)].float().masked_fill(padding[:, None], 0.0)


def quantize_rows(x: Tensor, groups: TokenGroups, scale_format: ScaleFormat) -> RowOperand:
    """`(M, K)` to a row operand: 1 x 128 tiles along the features."""
    padded = F.pad(gather_padded_rows(x, groups), (0, -x.shape[1] % BLOCK))
    num_rows, num_features = padded.shape
    data, scale = quantize_tiles(padded.view(num_rows, num_features // BLOCK, BLOCK), (2,), scale_format)
    rows = RowOperand.empty(num_rows, num_features, x.device)
    rows.data.copy_(data.view(num_rows, num_features))
    rows.scale.copy_(scale.squeeze(2))
    return rows


def quantize_tokens(
    x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout, token_tile: int = BLOCK
) -> TokenOperand:
    """`(M, D)` to a token operand: `token_tile` tokens of one feature a tile."""
    long_tiles = None if token_tile == BLOCK else measure_long_tiles(x, groups, token_tile)
    return quantize_tokens_in(long_tiles, x, groups, scale_format, layout)


def quantize_tokens_in(
    long_tiles: LongTiles | None, x: Tensor, groups: TokenGroups, scale_format: ScaleFormat, layout: TokenLayout
) -> TokenOperand:
    """`(M, D)` to a token operand, in tiles that were measured before (what exceeds their maxima saturates), or in
    tiles of 128 tokens if `long_tiles` is None."""
    padded = gather_padded_rows(x, groups)
    num_rows, num_features = padded.shape
    blocks = padded.view(num_rows // BLOCK, BLOCK, num_features)
    if long_tiles is None:
        data, scale = quantize_tiles(blocks, (1,), scale_format)
    else:
        amax = long_tiles.amax[:, None]
        negligible = amax < LONG_TILE_FLOOR
        data, scale = quantize_with_amax(torch.where(negligible, blocks * 0.0, blocks), amax, scale_format)
        scale = scale.masked_fill(negligible, 1.0)
    data = data.view(num_rows, num_features).t().contiguous()
    if layout is TokenLayout.PER_EXPERT:
        flat = torch.zeros(data.numel(), dtype=torch.uint8, device=data.device)
        flat[_per_expert_index(groups, num_features)] = data.view(torch.uint8)
        data = flat.view(torch.float8_e4m3fn)
    return TokenOperand(data, scale.squeeze(1), layout, long_tiles.token_tile if long_tiles else BLOCK)


def measure_long_tiles(x: Tensor, groups: TokenGroups, token_tile: int) -> LongTiles:
    """The tiles of `token_tile` tokens, 256 or 512, of `x` `(M, D)`."""
    padded = gather_padded_rows(x, groups)
    num_rows, num_features = padded.shape
    block_amax = padded.view(num_rows // BLOCK, BLOCK, num_features).abs().amax(1)
    return LongTiles(token_tile, long_tile_amax(block_amax, groups, token_tile))


def quantize_operands(
    x: Tensor,
    groups: TokenGroups,
    scale_format: ScaleFormat,
    rows: bool,
    tokens: TokenLayout | None,
    token_tile: int = BLOCK,
) -> tuple[RowOperand | None, TokenOperand | None]:
    """The operands asked for of `x` `(rows, D)`."""
    return (
        quantize_rows(x, groups, scale_format) if rows else None,
        quantize_tokens(x, groups, scale_format, tokens, token_tile) if tokens else None,
    )


def quantize_weight(w: Tensor, scale_format: ScaleFormat) -> tuple[WeightOperand, WeightOperand]:
    """`(E, N, K)` to the operands of forward and dgrad: 128 x 128 blocks, one set of scales for both."""
    padded = F.pad(w.float(), (0, -w.shape[2] % BLOCK, 0, -w.shape[1] % BLOCK))
    num_experts, n, k = padded.shape
    blocks = padded.contiguous().view(num_experts, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    data, scale = quantize_tiles(blocks, (2, 4), scale_format)
    data, scale = data.view(num_experts, n, k), scale[:, :, 0, :, 0]
    dgrad = WeightOperand(data.transpose(1, 2).contiguous(), scale.transpose(1, 2))
    return WeightOperand(data, scale), dgrad


def gather_codes(codes: Tensor, scale: Tensor, groups: TokenGroups) -> RowOperand:
    """Codes `(M, K)` with their scales `(M, K/128)`, powers of two, `K` whole blocks, to a row operand as they are."""
    source, padding = groups.row_source.clamp(min=0), (groups.row_source < 0)[:, None]
    rows = RowOperand.empty(groups.capacity, codes.shape[1], codes.device)
    rows.data.view(torch.uint8).copy_(codes.view(torch.uint8)[source].masked_fill(padding, 0))
    _, scale_of_zeros = quantize_tiles(scale.new_zeros(1, BLOCK), (1,), ScaleFormat.POW2)
    rows.scale.copy_(torch.where(padding, scale_of_zeros, scale[source]))
    return rows


def dequantize_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 `(M, D)`: what codes of any number of features stand for, with one scale a block of 128 of them."""
    return codes.float() * scale.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]


def dequantize_rows(rows: RowOperand) -> Tensor:
    """fp32 `(R, K)`."""
    num_rows, num_features = rows.data.shape
    tiles = rows.data.float().view(num_rows, num_features // BLOCK, BLOCK)
    return (tiles * rows.scale[:, :, None]).view(num_rows, num_features)


def dequantize_tokens(tokens: TokenOperand, groups: TokenGroups) -> Tensor:
    """fp32 `(D, R)`, the groups side by side, whatever the operand's layout."""
    num_features = tokens.scale.shape[0]
    data = tokens.data
    if tokens.layout is TokenLayout.PER_EXPERT:
        data = data.view(torch.uint8)[_per_expert_index(groups, num_features)].view(torch.float8_e4m3fn)
    tiles = data.float().view(num_features, groups.capacity // BLOCK, BLOCK)
    return (tiles * tokens.scale[:, :, None]).view(num_features, groups.capacity)


def dequantize_weight(weight: WeightOperand) -> Tensor:
    """fp32, the shape of `weight.data`."""
    num_experts, n, k = weight.data.shape
    blocks = weight.data.float().view(num_experts, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    return (blocks * weight.scale[:, :, None, :, None]).view(num_experts, n, k)


def first_blocks(groups: TokenGroups, token_tile: int) -> Tensor:
    """int64 `(R/128,)`: of each block of 128 padded rows, the first block of its token tile; of a block of no group,
    the block itself."""
    blocks = torch.arange(groups.capacity // BLOCK, device=groups.padded_ends.device)
    expert = groups.row_expert[::BLOCK].long()  # groups are padded to 128 rows: a live block's first row is live
    start = F.pad(groups.padded_ends, (1, -1))[expert.clamp(min=0)] // BLOCK
    return torch.where(expert < 0, blocks, blocks - (blocks - start) % (token_tile // BLOCK))


def long_tile_amax(block_amax: Tensor, groups: TokenGroups, token_tile: int) -> Tensor:
    """The maxima `(R/128, D)` of the token tiles that blocks of 128 tokens lie in, from the maxima of the blocks."""
    first = first_blocks(groups, token_tile)
    amax = torch.zeros_like(block_amax)
    for number in range(token_tile // BLOCK):
        block = (first + number).clamp(max=max(len(first) - 1, 0))
        amax = torch.maximum(amax, block_amax[block].masked_fill((first[block] != first)[:, None], 0.0))
    return amax


def _per_expert_index(groups: TokenGroups, num_features: int) -> Tensor:
    """int64 `(D, R)`: where element (feature, padded row) lies in the PER_EXPERT layout.

    An expert's block starts at `D * start` and its rows are as long as the group. Rows past the last group keep what is
    left of the buffer, as a group of their own.
    """
    ends = torch.cat([groups.padded_ends, groups.padded_ends.new_tensor([groups.capacity])]).long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    rows = torch.arange(groups.capacity, device=ends.device)
    group = torch.bucketize(rows, ends, right=True)
    features = torch.arange(num_features, device=ends.device)
    within = rows - starts[group]
    return starts[group] * num_features + within + features[:, None] * (ends - starts)[group]
