"""The work of the kernels of one product `(M, K)` times `(E, N, K)` to `(M, N)`."""

from fp8moe.bench.ceilings import BF16_BYTES, INDEX_BYTES, KernelWork, Precision, Sizes
from fp8moe.operands import BLOCK
from fp8moe.quantize.fingerprint import SECTOR, SECTORS


def plan_groups(s: Sizes) -> KernelWork:
    """`plan_groups`: `offs` in; out, two ends an expert, two numbers a padded row, one a row."""
    return KernelWork(INDEX_BYTES * (s.e + 2 * s.e + 2 * s.capacity + s.m))


def quantize_activation(s: Sizes, features: int, operands: int) -> KernelWork:
    """`(M, features)` to one operand (rows or tokens) or both."""
    return KernelWork(s.rows(features) + operands * s.operand(features))


def quantize_weight(s: Sizes, n: int, k: int, operands: int) -> KernelWork:
    """`(E, N, K)` to the codes for forward, for dgrad or for both, and one set of scales."""
    return KernelWork(s.weight(n, k) + s.weight_operands(n, k, operands))


def find_changes(s: Sizes, n: int, k: int) -> KernelWork:
    """The part of `(E, N, K)` that tells whether it has changed."""
    return KernelWork(s.weight(n, k) * SECTORS * SECTOR // BLOCK**2)


def m_grouped(s: Sizes, contracted: int, out: int, out_bytes: int) -> KernelWork:
    """Forward or dgrad: a row operand of the contracted features times a weight operand, to `out` features."""
    return KernelWork(
        s.operand(contracted) + s.weight_operands(contracted, out) + out_bytes, 2 * s.m * contracted * out
    )


def wgrad(s: Sizes, n: int, k: int) -> KernelWork:
    """`(N, R)` times `(K, R)` to `(E, N, K)`."""
    return KernelWork(s.operand(n) + s.operand(k) + s.weight(n, k), 2 * s.m * n * k)


def bf16_gemm(s: Sizes, n: int, k: int) -> KernelWork:
    """Forward, dgrad or wgrad in BF16: each touches the same three tensors."""
    return KernelWork((s.m * k + s.m * n + s.e * n * k) * BF16_BYTES, 2 * s.m * n * k, "bf16")


def step_work(s: Sizes, n: int, k: int, precision: Precision) -> list[KernelWork]:
    """The fewest kernels of forward and backward: in FP8, both operands of `a` and `dout` from one read each, the
    weight in each direction, three GEMMs."""
    if precision == "bf16":
        return [bf16_gemm(s, n, k)] * 3
    return [
        quantize_activation(s, k, operands=2),
        quantize_weight(s, n, k, operands=1),
        m_grouped(s, k, n, s.rows(n)),
        quantize_activation(s, n, operands=2),
        quantize_weight(s, n, k, operands=1),
        m_grouped(s, n, k, s.rows(k)),
        wgrad(s, n, k),
    ]
