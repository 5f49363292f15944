"""The work of the kernels of one layer.

The router's weights, the maps and the row plan, some bytes a row, count only in the rows of their own kernels. The
maxima of long token tiles, `I / 32` bytes a row, do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8moe.bench.ceilings import INDEX_BYTES, KernelWork, Precision, Sizes
from fp8moe.bench.product.work import bf16_gemm, m_grouped, quantize_weight, wgrad
from fp8moe.bench.shapes import Shape

TOPK_ID_BYTES = 8


@dataclass(frozen=True)
class LayerWork:
    """Of a layer of `T` tokens, `H` features and `I` of an activation. What lies between two kernels is BF16."""

    s: Sizes
    t: int
    h: int
    i: int

    @classmethod
    def of(cls, shape: Shape, group_sizes: Sequence[int], dtype: torch.dtype) -> "LayerWork":
        """Of experts of these rows, the tokens and weights in `dtype`."""
        return cls(Sizes.of(group_sizes, dtype), shape["T"], shape["H"], shape["I"])

    @property
    def tokens(self) -> int:
        """Bytes of `(T, H)`."""
        return self.t * self.h * self.s.itemsize

    @property
    def route(self) -> KernelWork:
        """`Routing.from_topk`: the ids in; out, the row plan, one number more a padded row and one a choice."""
        s = self.s
        return KernelWork(TOPK_ID_BYTES * s.m + INDEX_BYTES * (2 * s.e + 3 * s.capacity + 2 * s.m))

    @property
    def quantize_tokens(self) -> KernelWork:
        """`(T, H)`, each token read once, to both operands of the rows that copy it."""
        return KernelWork(self.tokens + 2 * self.s.operand(self.h))

    @property
    def swiglu(self) -> KernelWork:
        """`(M, 2I)` to the row operand of the activation."""
        return KernelWork(self.s.bf16_rows(2 * self.i) + self.s.operand(self.i))

    @property
    def swiglu_backward(self) -> KernelWork:
        """The activation's gradient and `(M, 2I)` to both operands of gate and up, and the activation's token
        operand."""
        s, i = self.s, self.i
        return KernelWork(s.bf16_rows(i) + s.bf16_rows(2 * i) + 2 * s.operand(2 * i) + s.operand(i))

    @property
    def combine(self) -> KernelWork:
        """`(M, H)` to `(T, H)`."""
        return KernelWork(self.s.bf16_rows(self.h) + self.tokens)

    @property
    def dequantize_rows(self) -> KernelWork:
        """The row operand that keeps `(M, 2I)` in FP8, back to BF16."""
        return KernelWork(self.s.operand(2 * self.i) + self.s.bf16_rows(2 * self.i))

    def step(self, precision: Precision) -> list[KernelWork]:
        """The fewest kernels of forward and backward.

        In FP8 tokens and output gradients are quantized (both operands) as rows are gathered, SwiGLU and its backward
        make every operand in one pass, and `combine` adds up each token's rows. In BF16 rows are copied.
        """
        s, h, i = self.s, self.h, self.i
        if precision == "bf16":
            gather = self.combine  # the same bytes the other way
            activate = KernelWork(s.bf16_rows(2 * i) + s.bf16_rows(i))
            activate_backward = KernelWork(s.bf16_rows(i) + 2 * s.bf16_rows(2 * i))
            products = [bf16_gemm(s, 2 * i, h), bf16_gemm(s, h, i)] * 3
            return [gather, activate, self.combine, gather, activate_backward, self.combine, *products]
        return [
            self.quantize_tokens,
            quantize_weight(s, 2 * i, h, operands=1),
            m_grouped(s, h, 2 * i, s.bf16_rows(2 * i)),
            self.swiglu,
            quantize_weight(s, h, i, operands=1),
            m_grouped(s, i, h, s.bf16_rows(h)),
            self.combine,
            self.quantize_tokens,
            quantize_weight(s, h, i, operands=1),
            m_grouped(s, h, i, s.bf16_rows(i)),
            self.swiglu_backward,
            quantize_weight(s, 2 * i, h, operands=1),
            m_grouped(s, 2 * i, h, s.bf16_rows(h)),
            self.combine,
            wgrad(s, 2 * i, h),
            wgrad(s, h, i),
        ]
