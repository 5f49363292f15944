"""Device functions shared by the quantization kernels: the Triton twin of `reference.quantize_tiles`."""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """The bits of |x| for fp32 `x`. As integers they order like the numbers, with infinity and then NaN on top, so an
    integer maximum never drops a NaN, as the float maximum of the hardware does."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def divide_by_448(m):
    """`m / 448`, correctly rounded, for `m` in [1, 2): a product with the rounded reciprocal, mended by its remainder.

    Exhaustively checked over all 2**23 values, as is `divide_448_by`. `tl.div_rn` gives the same bits, but branches
    (for operands that never occur here) and so cannot overlap the divisions of a thread.
    """
    reciprocal = 1 / 448
    quotient = m * reciprocal
    remainder = tl.fma(quotient, tl.full(m.shape, -448.0, tl.float32), m)
    return tl.fma(remainder, tl.full(m.shape, reciprocal, tl.float32), quotient)


@triton.jit
def divide_448_by(m):
    """`448 / m`, correctly rounded, for `m` in [1, 2)."""
    # A quadratic is within 1.1% of 1/m; two Newton steps square its relative error twice, to fp32's precision.
    reciprocal = tl.fma(m, tl.full(m.shape, 0.32321127, tl.float32), tl.full(m.shape, -1.454453, tl.float32))
    reciprocal = tl.fma(reciprocal, m, tl.full(m.shape, 2.12112104, tl.float32))
    one = tl.full(m.shape, 1.0, tl.float32)
    reciprocal = tl.fma(tl.fma(-m, reciprocal, one), reciprocal, reciprocal)
    reciprocal = tl.fma(tl.fma(-m, reciprocal, one), reciprocal, reciprocal)
    quotient = 448 * reciprocal
    remainder = tl.fma(-m, quotient, tl.full(m.shape, 448.0, tl.float32))
    return tl.fma(remainder, reciprocal, quotient)


@triton.jit
def tile_scale(amax_bits, POW2: tl.constexpr):
    """From the magnitude bits of each tile's maximum: its scale, and the factor to multiply its elements by.

    The factor is exact for POW2 (the reciprocal of a power of two), so multiplying equals the reference's division.
    """
    finite = amax_bits < 0x7F800000
    amax_bits = tl.maximum(amax_bits, 0x0D800000)  # 2**-100
    exponent_bits = (amax_bits & 0x7F800000) - 0x3F800000
    mantissa = ((amax_bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    # No quotient leaves the normal numbers, so the exponent is added to its bits.
    scale_bits = divide_by_448(mantissa).to(tl.int32, bitcast=True) + exponent_bits
    if POW2:
        scale_bits = (scale_bits + 0x7FFFFF) & 0x7F800000
        factor_bits = 0x7F000000 - scale_bits  # 2**-n has exponent bits 254 - those of 2**n
    else:
        factor_bits = divide_448_by(mantissa).to(tl.int32, bitcast=True) - exponent_bits
    nan_bits = 0x7FC00000
    scale = tl.where(finite, scale_bits, nan_bits).to(tl.float32, bitcast=True)
    return scale, tl.where(finite, factor_bits, nan_bits).to(tl.float32, bitcast=True)


@triton.jit
def encode_e4m3(x, factor):
    """`e4m3(x * factor)`, all NaN (0x7F) where the factor is NaN. No clamp: a finite tile's products round to at most
    448, and the hardware's conversion saturates."""
    return (x * factor).to(tl.float8e4nv)


@triton.jit
def column_amax_bits(tile_0, tile_1, tile_2, tile_3):
    """Magnitude bits of each column's maximum over the four quarters of a tile."""
    bits_01 = tl.maximum(magnitude_bits(tile_0), magnitude_bits(tile_1))
    bits_23 = tl.maximum(magnitude_bits(tile_2), magnitude_bits(tile_3))
    return tl.max(tl.maximum(bits_01, bits_23), axis=0)


@triton.jit
def encode_pair(tile_a, tile_b, factor):
    """The codes of two tiles as 16-bit words, those of `tile_a` in the low byte: one hardware conversion makes both."""
    code_a, code_b = tl.split(encode_e4m3(tl.join(tile_a, tile_b), factor).to(tl.uint8, bitcast=True))
    return code_a.to(tl.uint32) | (code_b.to(tl.uint32) << 8)


@triton.jit
def encode_words(tile_0, tile_1, tile_2, tile_3, factor):
    """The codes of a tile given as four interleaved quarters (rows 4i, 4i + 1, 4i + 2, 4i + 3), to be transposed:
    32-bit words `(rows / 4, columns)`, the codes of four consecutive rows in each, in memory order.

    Transposing single bytes goes through shared memory byte by byte, at a third of the copy rate on an H200; words go
    four times as fast. Nor may codes that are stored as they are be taken apart into words: the ptxas of Triton 3.6 and
    3.7 miscompiles that or crashes. So words have conversions of their own, of pairs that belong together.

    `factor` broadcasts against `(rows / 4, columns, 2)`.
    """
    low = encode_pair(tile_0, tile_1, factor)
    high = encode_pair(tile_2, tile_3, factor)
    return (low | (high << 16)).to(tl.int32, bitcast=True)
