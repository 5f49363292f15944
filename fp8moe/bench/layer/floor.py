"""How fast a layer could be: the bytes and flops of the fewest kernels, as `fp8moe.bench.floor` counts them.

The router's weights, the maps and the row plan, some bytes a row, count only in the rows of their own kernels. The
maxima of long token tiles, `I / 32` bytes a row, do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fp8moe.bench.floor import (
    BF16_BYTES,
    INDEX_BYTES,
    Precision,
    Sizes,
    Work,
    bf16_gemm,
    dgrad_gemm,
    forward_gemm,
    quantize_weight,
    wgrad_gemm,
)
from fp8moe.bench.layer.shapes import LayerShape

TOPK_ID_BYTES = 8


@dataclass(frozen=True)
class LayerSizes:
    """What the work of every kernel of one layer follows from."""

    t: int
    choices: int
    """`k`, of each token."""
    gate_up: Sizes
    """Of the product `(M, H)` to `(M, 2I)`, `M` the rows of all experts."""
    down: Sizes
    """Of the product `(M, I)` to `(M, H)`."""

    @classmethod
    def of(cls, shape: LayerShape, group_sizes: Sequence[int], dtype: torch.dtype) -> "LayerSizes":
        """The sizes of `shape` with experts of these rows, the tokens and weights in `dtype`."""
        gate_up, down = (Sizes.of(product, group_sizes, dtype) for product in (shape.gate_up, shape.down))
        return cls(shape.t, shape.k, gate_up, down)

    @property
    def h(self) -> int:
        """Features of a token."""
        return self.gate_up.k

    @property
    def i(self) -> int:
        """Features of an activation."""
        return self.down.k

    @property
    def tokens(self) -> int:
        """Bytes of `(T, H)`."""
        return self.t * self.h * self.gate_up.itemsize

    def rows(self, features: int) -> int:
        """Bytes of a `(M, features)` between two kernels, in BF16 whatever the dtype of the tokens."""
        return self.gate_up.m * features * BF16_BYTES

    def operand(self, features: int) -> int:
        """Bytes of a row or token operand."""
        return self.gate_up.operand(features)


def route(s: LayerSizes) -> Work:
    """`Routing.from_topk`: the ids in; out, the row plan, one number more a padded row and one a choice."""
    experts, capacity, rows = s.gate_up.e, s.gate_up.capacity, s.gate_up.m
    return Work(TOPK_ID_BYTES * rows + INDEX_BYTES * (2 * experts + 3 * capacity + 2 * rows))


def quantize_tokens(s: LayerSizes) -> Work:
    """`(T, H)`, each token read once, to both operands of the rows that copy it."""
    return Work(s.tokens + 2 * s.operand(s.h))


def swiglu(s: LayerSizes) -> Work:
    """`(M, 2I)` to the row operand of the activation."""
    return Work(s.rows(2 * s.i) + s.operand(s.i))


def swiglu_backward(s: LayerSizes) -> Work:
    """The activation's gradient and `(M, 2I)` to both operands of gate and up, and the activation's token operand."""
    return Work(s.rows(s.i) + s.rows(2 * s.i) + 2 * s.operand(2 * s.i) + s.operand(s.i))


def combine(s: LayerSizes) -> Work:
    """`(M, H)` to `(T, H)`."""
    return Work(s.rows(s.h) + s.tokens)


def dequantize_rows(s: LayerSizes) -> Work:
    """The row operand that keeps `(M, 2I)` in FP8, back to BF16."""
    return Work(s.operand(2 * s.i) + s.rows(2 * s.i))


def forward_work(s: LayerSizes, precision: Precision) -> list[Work]:
    """The fewest kernels of a training forward.

    In FP8: the tokens are quantized (both operands) and multiplied with the quantized weight; SwiGLU is computed and
    quantized in one pass, and multiplied with the other quantized weight; each token's rows are added up. In BF16, the
    rows are copied, multiplied, activated, multiplied and added up.
    """
    if precision == "bf16":
        gather = combine(s)  # the same bytes the other way
        activate = Work(s.rows(2 * s.i) + s.rows(s.i))
        return [gather, bf16_gemm(s.gate_up), activate, bf16_gemm(s.down), combine(s)]
    return [
        quantize_tokens(s),
        quantize_weight(s.gate_up, operands=1),
        forward_gemm(_in_bf16(s.gate_up)),
        swiglu(s),
        quantize_weight(s.down, operands=1),
        forward_gemm(_in_bf16(s.down)),
        combine(s),
    ]


def backward_work(s: LayerSizes, precision: Precision) -> list[Work]:
    """The fewest kernels of a backward.

    In FP8: the output's gradient is quantized (both operands) and multiplied with the quantized weight; SwiGLU's
    backward makes every operand in one pass; its gradient is multiplied with the other quantized weight, and each
    token's rows are added up; two products are the weights' gradients. In BF16, the rows of the gradient are copied,
    SwiGLU's backward reads its gradient and its input and writes the gradient of the input, four products, one sum.
    """
    if precision == "bf16":
        gather = combine(s)
        activate = Work(s.rows(s.i) + 2 * s.rows(2 * s.i))
        return [gather, *[bf16_gemm(s.down)] * 2, activate, *[bf16_gemm(s.gate_up)] * 2, combine(s)]
    return [
        quantize_tokens(s),
        quantize_weight(s.down, operands=1),
        dgrad_gemm(_in_bf16(s.down)),
        swiglu_backward(s),
        quantize_weight(s.gate_up, operands=1),
        dgrad_gemm(_in_bf16(s.gate_up)),
        combine(s),
        wgrad_gemm(s.gate_up),
        wgrad_gemm(s.down),
    ]


def _in_bf16(s: Sizes) -> Sizes:
    """Of a product whose rows come out in BF16."""
    return replace(s, itemsize=BF16_BYTES)
