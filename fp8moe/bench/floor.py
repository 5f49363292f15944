"""The floor of whole steps: the fewest FP8 kernels of forward and backward, by the sizes alone.

Bytes and flops count as in `ceilings`. The router's weights, the maps and the row plan, some bytes a row, do not count.
"""

from collections.abc import Sequence

from fp8moe.bench.ceilings import Ceilings, rows_in_use
from fp8moe.bench.shapes import Shape
from fp8moe.operands import BLOCK

Work = tuple[float, int]
"""Bytes and flops of one kernel."""
BF16, OPERAND, WEIGHT = 2, 1 + 4 / BLOCK, 1 + 4 / BLOCK**2
"""Bytes of an element: of row and token operands, and of weight operands, with its share of a scale."""


def step_floor_ms(kernels: Sequence[Work], ceilings: Ceilings) -> float | None:
    """Milliseconds below which these kernels, one after the other, cannot come; None without an FP8 rate."""
    floors = [ceilings.floor_ms(num_bytes, flops, in_bf16=False) for num_bytes, flops in kernels]
    return None if None in floors else sum(filter(None, floors))


def product_step(shape: Shape, group_sizes: Sequence[int]) -> list[Work]:
    """Both operands of `a` and of the output's gradient from one read each, and the kernels of the weight."""
    m, n, k, e = shape.sizes
    used = rows_in_use(group_sizes)
    return [((BF16 * m + 2 * OPERAND * used) * features, 0) for features in (k, n)] + _with_weight(m, used, n, k, e)


def layer_step(shape: Shape, group_sizes: Sequence[int]) -> list[Work]:
    """Rows are quantized as they are gathered, SwiGLU and its backward make every operand in one pass."""
    t, k, h, i, e = shape.sizes
    m, used = t * k, rows_in_use(group_sizes)
    gather, combine = ((BF16 * t + 2 * OPERAND * used) * h, 0), (BF16 * (m + t) * h, 0)
    swiglu, backward = ((BF16 * 2 * m + OPERAND * used) * i, 0), ((BF16 * 3 * m + OPERAND * 5 * used) * i, 0)
    products = _with_weight(m, used, 2 * i, h, e) + _with_weight(m, used, h, i, e)
    return [gather, swiglu, combine, gather, backward, combine, *products]


def _with_weight(m: int, used: int, n: int, k: int, e: int) -> list[Work]:
    """Of a weight `(E, N, K)`: its quantization for forward and for dgrad, and the three GEMMs."""
    w, flops = e * n * k, 2 * m * n * k
    forward = OPERAND * used * k + WEIGHT * w + BF16 * m * n, flops
    dgrad = OPERAND * used * n + WEIGHT * w + BF16 * m * k, flops
    wgrad = OPERAND * used * (n + k) + BF16 * w, flops
    return [((BF16 + WEIGHT) * w, 0)] * 2 + [forward, dgrad, wgrad]
