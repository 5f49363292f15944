"""What the integer products share: the exact dot, two ways; INT4 operands; and the order of tiles."""

import triton
import triton.language as tl


@triton.jit
def exact_dot(w, a, total, IN_FP16: tl.constexpr):
    """`total + w @ a`, int32, of int8 tiles.

    In fp16 every int8 is exact, and so are fp32 sums of up to 1024 products: for compilers whose int8 dot is broken.
    """
    if IN_FP16:
        return total + tl.dot(w.to(tl.float16), a.to(tl.float16)).to(tl.int32)
    else:
        return tl.dot(w, a, acc=total, out_dtype=tl.int32)


@triton.jit
def unpack_rows(packed, INT4: tl.constexpr, IN_PTX: tl.constexpr):
    """The operands in a tile of int8: itself, or the even and the odd rows of packed int4, each times 16.

    A nibble in the upper half of its byte is 16 times its value, sign and all. So a shift and a mask unpack, and the
    factor goes into the scale. In PTX four bytes take three instructions, where Triton's take sixteen.
    """
    if INT4 and IN_PTX:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;", "=&r,=r,r", [packed],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    elif INT4:
        return packed << 4, packed & -16
    else:
        return (packed,)


@triton.jit
def tile_in_bands(program, tile_rows, tile_columns, BAND: tl.constexpr):
    """Row and column of a tile. Programs that run at the same time take a band of BAND rows and few columns, so that
    what they read stays in L2."""
    band = program // (BAND * tile_columns)
    first = band * BAND
    height = tl.minimum(tile_rows - first, BAND)
    within = program % (BAND * tile_columns)
    return first + within % height, within // height
