"""Device functions shared by the quantization kernels: the Triton twin of `reference.quantize_tiles`.

A tile of 128 rows is held as sixteen `(8, columns)` parts, row `16 i + r` of the tile in row `i` of the `r`-th. Triton
then gives each thread sixteen consecutive rows of its columns: the maximum of a column is taken mostly within threads,
and the codes of a transposed tile cross shared memory in vectors of 16 bytes, four to eight times as fast as bytes.
"""

import triton
import triton.language as tl

AMAX_FLOOR = tl.constexpr(2.0**-100)
LONG_TILE_FLOOR = tl.constexpr(2.0**-60)


@triton.jit
def rows_of_tile(row_start, R: tl.constexpr):
    """The rows `(8,)` in the `R`-th of the sixteen parts of the tile that starts at `row_start`."""
    return row_start + 16 * tl.arange(0, 8) + R


@triton.jit
def join_sixteen(parts):
    """Sixteen tensors to one with four more dimensions of 2: the number of the part, highest bit first."""
    eighths = ()
    for r in tl.static_range(8):
        eighths = eighths + (tl.join(parts[r], parts[r + 8]),)
    quarters = ()
    for r in tl.static_range(4):
        quarters = quarters + (tl.join(eighths[r], eighths[r + 4]),)
    return tl.join(tl.join(quarters[0], quarters[2]), tl.join(quarters[1], quarters[3]))


@triton.jit
def transpose_tile(parts, COLUMNS: tl.constexpr):
    """Sixteen parts `(8, COLUMNS)` to the transposed tile `(COLUMNS, 128)`."""
    return tl.permute(join_sixteen(parts), (1, 0, 2, 3, 4, 5)).reshape(COLUMNS, 128)


@triton.jit
def maximum(a, b):
    """NaN if either is: the hardware's plain maximum drops NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_amax(part):
    """max|x| of each row."""
    return tl.reduce(tl.abs(part), 1, maximum)


@triton.jit
def column_amax(parts):
    """max|x| of each column over all sixteen parts."""
    amax = tl.abs(parts[0])
    for r in tl.static_range(15):
        amax = maximum(amax, tl.abs(parts[r + 1]))
    return tl.reduce(amax, 0, maximum)


@triton.jit
def dequantization_scale(amax, POW2: tl.constexpr):
    """The scale of a tile with this maximum: `amax / 448`, correctly rounded, or the power of two from there up.

    A product with the rounded reciprocal, corrected by its remainder. `tl.div_rn` gives the same bits, but branches
    (for operands that never occur here) and so cannot overlap the divisions of a thread. Checked for every mantissa.
    """
    dividend = tl.maximum(amax, AMAX_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    quotient = dividend * (1 / 448)
    scale = tl.fma(tl.fma(quotient, -448.0, dividend), 1 / 448, quotient)
    if POW2:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def quantization_factor(amax, scale, POW2: tl.constexpr):
    """What to multiply a tile with this maximum and this scale by: `448 / amax`, correctly rounded (checked for every
    mantissa); for POW2 `1 / scale`, exact, so that multiplying equals the reference's division. NaN where the maximum
    is not finite.
    """
    if POW2:
        # 2**-n has exponent bits 254 - those of 2**n.
        factor = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        # Both sides times 2**-16, so that no reciprocal is subnormal.
        divisor = tl.maximum(amax, AMAX_FLOOR, propagate_nan=tl.PropagateNan.ALL) * (1 / 65536)
        root = tl.rsqrt(divisor)  # to 2 units in the last place: a Newton step makes its square the reciprocal to one
        reciprocal = root * root
        reciprocal = tl.fma(tl.fma(-divisor, reciprocal, 1.0), reciprocal, reciprocal)
        quotient = reciprocal * (448 / 65536)
        factor = tl.fma(tl.fma(-divisor, quotient, 448 / 65536), reciprocal, quotient)
    return tl.where(amax < float("inf"), factor, float("nan"))


@triton.jit
def long_tile_scaling(amax, scale, factor):
    """The scale and the factor of a tile of 256 or 512 tokens with this maximum, from those of any tile. A long tile is
    zeros, with a scale of 1, if its maximum is below the floor."""
    is_negligible = amax < LONG_TILE_FLOOR
    return tl.where(is_negligible, 1.0, scale), tl.where(is_negligible, 0.0, factor)


@triton.jit
def token_scaling(amax, IS_LONG: tl.constexpr, POW2: tl.constexpr):
    """The scale and the factor of a token tile with this maximum, of 128 tokens or longer."""
    scale = dequantization_scale(amax, POW2)
    factor = quantization_factor(amax, scale, POW2)
    if IS_LONG:
        scale, factor = long_tile_scaling(amax, scale, factor)
    return scale, factor


@triton.jit
def encode_e4m3(x, factor):
    """`e4m3(x * factor)`, all NaN (0x7F) where the factor is NaN. No clamp: a finite tile's products round to at most
    448, and the hardware's conversion saturates."""
    return (x * factor).to(tl.float8e4nv)


@triton.jit
def encode_columns(parts, factor, COLUMNS: tl.constexpr):
    """The codes of a tile, transposed: `(COLUMNS, 128)`. `factor` is one for each column, or a scalar.

    They are converted again even where the codes of the rows exist already: the ptxas of Triton 3.6 and 3.7
    miscompiles, or crashes on, codes that are stored as they are and also taken apart into bytes.
    """
    tile = join_sixteen(parts)  # (8, COLUMNS, 2, 2, 2, 2)
    if len(factor.shape) == 1:
        factor = factor[None, :, None, None, None, None]
    codes = encode_e4m3(tile, factor)
    return tl.permute(codes, (1, 0, 2, 3, 4, 5)).reshape(COLUMNS, 128)
