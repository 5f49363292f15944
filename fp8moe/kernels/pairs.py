"""Device functions for pairs of neighbouring floats, the first of which belong to one tile and the second to another.

A pair is loaded as one integer, with its first float in the low bits. So memory is read in whole vectors, and bf16 and
fp16 stay packed, in half the registers that they take as fp32, until the floats of one tile are encoded.
"""

import triton
import triton.language as tl

from fp8moe.kernels.numerics import column_amax, maximum


@triton.jit
def pointer_to_pairs(x):
    """`x`, a pointer to floats that is aligned to pairs of them, as a pointer to these."""
    pair = tl.int32 if x.dtype.element_ty.primitive_bitwidth == 16 else tl.int64
    return x.to(tl.pointer_type(pair), bitcast=True)


@triton.jit
def one_of_pairs(pairs, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """The first (0) or second (1) float of each pair of this dtype, in fp32."""
    bits = pairs >> NUMBER * dtype.primitive_bitwidth
    return bits.to(tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def one_of_parts(parts, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """`one_of_pairs` for each of the sixteen parts of a tile."""
    floats = ()
    for r in tl.static_range(16):
        floats = floats + (one_of_pairs(parts[r], NUMBER, dtype),)
    return floats


@triton.jit
def amax_of_pairs(parts, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """max|x| over the first or the second floats of all sixteen parts, in fp32; NaN if any is."""
    if dtype.primitive_bitwidth == 16:
        # Without their signs, floats are in the order of their bits, NaN last. Were they compared in fp32, the compiler
        # would keep them so, unpacked.
        largest = parts[0] & (0x7FFFFFFF if NUMBER else 0x7FFF)
        for r in tl.static_range(15):
            largest = tl.maximum(largest, parts[r + 1] & (0x7FFFFFFF if NUMBER else 0x7FFF))
        return one_of_pairs(tl.max(tl.max(largest, 0), 0), NUMBER, dtype)
    else:
        return tl.reduce(column_amax(one_of_parts(parts, NUMBER, dtype)), 0, maximum)
