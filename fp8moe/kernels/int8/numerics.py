"""Device functions of integer quantization: the Triton twin of `fp8moe.int8.reference`. No function of a vendor's
library: every step is one of IEEE arithmetic."""

import triton
import triton.language as tl

AMAX_FLOOR = tl.constexpr(2.0**-100)
MAGIC = tl.constexpr(12582912.0)
"""`1.5 * 2**23`: fp32 numbers near it are integers apart, so adding it rounds to an integer, half to even."""
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def scaling(amax, LEVELS: tl.constexpr):
    """The scale of a tile with this maximum, and what to multiply the tile by: 0 where the maximum is not finite."""
    is_finite = amax < float("inf")
    floored = tl.maximum(amax, AMAX_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    levels = tl.full(amax.shape, LEVELS, tl.float32)
    scale = tl.where(amax == 0.0, 1.0, tl.div_rn(floored, levels))
    factor = tl.div_rn(levels, floored)
    return tl.where(is_finite, scale, float("nan")), tl.where(is_finite, factor, 0.0)


@triton.jit
def encode(x, factor, AWAY: tl.constexpr):
    """int8 codes of `x * factor`, of which the exact product is rounded once; 0 where the factor is."""
    magnitude = tl.abs(x) if AWAY else x
    rounded = tl.fma(magnitude, factor, tl.full(x.shape, MAGIC, tl.float32))
    if AWAY:
        whole = rounded - MAGIC
        # The remainder has the sign of the exact one: it is 0 where a half has been rounded down, to even.
        whole += (tl.fma(magnitude, factor, -(whole + 0.5)) == 0.0).to(tl.float32)
        code = tl.where(x < 0.0, -whole, whole).to(tl.int32)
    else:
        code = rounded.to(tl.int32, bitcast=True) - MAGIC_BITS
    return tl.where(factor > 0.0, code, 0).to(tl.int8)
