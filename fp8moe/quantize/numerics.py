"""Device functions shared by the quantization kernels: the Triton twin of `reference.quantize_tiles`."""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """The bits of |x| for fp32 `x`. As integers they order like the numbers, with infinity and then NaN on top, so an
    integer maximum never drops a NaN, as the float maximum of the hardware does."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_scale(amax_bits, POW2: tl.constexpr):
    """From the magnitude bits of each tile's maximum: its scale, and the factor to multiply its elements by.

    The factor is exact for POW2 (the reciprocal of a power of two), so multiplying equals the reference's division.
    """
    finite = amax_bits < 0x7F800000
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)  # 2**-100
    scale = tl.div_rn(amax, 448.0)  # `/` would compile to an approximate division
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
        factor = (0x7F000000 - bits).to(tl.float32, bitcast=True)  # 2**-n has exponent bits 254 - those of 2**n
    else:
        factor = tl.div_rn(448.0, amax)
    nan = float("nan")
    return tl.where(finite, scale, nan), tl.where(finite, factor, nan)


@triton.jit
def encode_e4m3(x, factor):
    """`e4m3(x * factor)`, all NaN (0x7F) where the factor is NaN. No clamp: a finite tile's products round to at most
    448, and the hardware's conversion saturates."""
    return (x * factor).to(tl.float8e4nv)
