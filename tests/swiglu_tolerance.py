"""How far a SwiGLU kernel may be from its definition: by one code in at most 1e-4 of the elements, by two units in the
last place of a scale, and in one scale of 50 by up to eight: as far apart as two good exponentials bring two products.
Where `1 + gate * (1 - sigmoid)` cancels, units of what is cancelled count.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.gate import SWIGLU, Gate, GateKind
from fp8moe.operands import RowOperand, TokenGroups, TokenOperand
from fp8moe.quantize import reference
from tests.measures import assert_same_bits


@dataclass(frozen=True, eq=False)
class Tiles:
    """What a kernel made, one tile a row, beside the unquantized values it should be made of."""

    codes: Tensor
    """e4m3 `(tiles, length)`."""
    scale: Tensor
    """fp32 `(tiles,)`."""
    values: Tensor
    """fp32 `(tiles, length)`."""
    cancelled: Tensor
    """fp32 `(tiles, length)`: the size of the terms that cancel in a value; zero where none do."""


def tiles_of_rows(rows: RowOperand, values: Tensor, cancelled: Tensor, groups: TokenGroups) -> Tiles:
    """The used rows; `values` and `cancelled` are `(M, D)`."""
    used = int(groups.padded_ends[-1])
    padded = [reference.gather_padded_rows(x, groups)[:used].reshape(-1, 128) for x in (values, cancelled)]
    return Tiles(rows.data[:used].reshape(-1, 128), rows.scale[:used].flatten(), *padded)


def tiles_of_tokens(tokens: TokenOperand, values: Tensor, cancelled: Tensor, groups: TokenGroups) -> Tiles:
    """The used tokens; `values` and `cancelled` are `(M, D)`."""
    used = int(groups.padded_ends[-1])
    padded = [reference.gather_padded_rows(x, groups)[:used].t().reshape(-1, 128) for x in (values, cancelled)]
    plain = replace(tokens, stored_scale=torch.ones_like(tokens.stored_scale))  # decodes to the codes as they are
    codes = reference.dequantize_tokens(plain, groups)[:, :used].to(torch.float8_e4m3fn)
    return Tiles(codes.reshape(-1, 128), tokens.scale[:, : used // 128].flatten(), *padded)


def cancelled_terms(d_act: Tensor, x: Tensor, row_weights: Tensor | None, gate: Gate = SWIGLU) -> Tensor:
    """fp32 `(rows, 2I)`: for each element of d_gate the size of the terms that may cancel in it, for d_up zero. `d_act`
    is `(rows, I)`, `x` `(rows, 2I)` with its bias; `(rows, I)` without a gate, where nothing cancels."""
    if not gate.has_gate:
        return torch.zeros_like(x, dtype=torch.float32)
    up, exponent = x.float().chunk(2, dim=1)[1], exponents(x, gate)
    if gate.kind is GateKind.CLAMPED_SWIGLU:
        limit, _, up_offset = gate.parameters
        up = up.clamp(-limit, limit) + up_offset
    growth = exponent.abs() * (3 if gate.kind is GateKind.GEGLU_TANH else 1)  # at most
    size = d_act.float().abs() * up.abs() * torch.sigmoid(exponent) * (1 + growth)
    if row_weights is not None:
        size = size * row_weights.float().abs()[:, None]
    return torch.cat([size.nan_to_num(0.0, 0.0), torch.zeros_like(size)], dim=1)


def exponents(x: Tensor, gate: Gate) -> Tensor:
    """fp32 `(rows, I)`: what a gate takes the sigmoid of, zeros without one. A rounding there grows by its size."""
    if not gate.has_gate:
        return torch.zeros_like(x, dtype=torch.float32)
    first, _ = x.float().chunk(2, dim=1)
    match gate.kind:
        case GateKind.CLAMPED_SWIGLU:
            return first.clamp(max=gate.parameters[0]) * gate.parameters[1]
        case GateKind.GEGLU_TANH:
            return 1.5958 * first * (1 + 0.044715 * first * first)
        case _:
            return first


def assert_near(tiles: Tiles, scale_format: ScaleFormat) -> None:
    """Hold `tiles` to the definition, as near as a kernel's own exponential allows."""
    codes, scale = reference.quantize_tiles(tiles.values, (1,), scale_format)
    exact = reference.quantize_tiles(tiles.values, (1,), ScaleFormat.FP32)[1].squeeze(1)
    scale = scale.squeeze(1)
    finite = scale.isfinite()
    assert_same_bits(tiles.scale[~finite], scale[~finite])
    assert_same_bits(tiles.codes[~finite], codes[~finite])

    exact = torch.where(finite, exact, 1.0)
    unit = torch.nextafter(exact, torch.full_like(exact, torch.inf)) - exact
    unit = unit + tiles.cancelled.amax(1) / 448 * 2**-23

    def off_by_more_than(units: int) -> Tensor:
        lowest, highest = (exact - units * unit).clamp(min=0.999 * reference.AMAX_FLOOR / 448), exact + units * unit
        if scale_format is ScaleFormat.POW2:
            lowest, highest = (reference.round_up_to_power_of_two(x) for x in (lowest, highest))
        return ((tiles.scale < lowest) | (tiles.scale > highest))[finite]

    assert int(off_by_more_than(2).sum()) <= 4 + finite.numel() // 50  # few tiles may all be unlucky
    assert not off_by_more_than(8).any()

    # A power of two may also be the other one where the maximum is next to it; then all codes of the tile are others.
    comparable = finite if scale_format is ScaleFormat.FP32 else finite & (tiles.scale == scale)
    assert int(finite.sum() - comparable.sum()) <= 1 + 1e-3 * finite.numel()
    actual, expected = _ordered(tiles.codes[comparable]), _ordered(codes[comparable])
    difference = (actual - expected).abs()
    assert (difference <= 1).all(), f"codes differ by up to {int(difference.max())}"
    assert int((difference > 0).sum()) <= max(1.0, 1e-4 * difference.numel())


def _ordered(codes: Tensor) -> Tensor:
    """Whole numbers in the order of the values: neighbours differ by one, both zeros are the same, NaN is 127."""
    bits = codes.contiguous().view(torch.uint8).int()
    magnitude = bits & 0x7F
    return torch.where(bits > 0x7F, -magnitude, magnitude)


def plain(values: Tensor) -> Tensor:
    """No cancellation anywhere in `values`."""
    return torch.zeros_like(values, dtype=torch.float32)
