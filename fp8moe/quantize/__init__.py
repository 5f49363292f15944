"""High precision to the operands of the grouped GEMMs. `reference.py` defines every bit; kernels run on CUDA, the
reference itself everywhere else.

Where a row lies is decided by `TokenGroups`; which layout a GEMM wants, by its backend (`fp8moe.gemm`).
"""

from fp8moe.quantize.activations import quantize_operands, quantize_rows, quantize_rows_and_tokens, quantize_tokens
from fp8moe.quantize.weights import (
    quantize_weight_for_both,
    quantize_weight_for_dgrad,
    quantize_weight_for_forward,
    quantize_weight_into,
)

__all__ = [
    "quantize_operands",
    "quantize_rows",
    "quantize_rows_and_tokens",
    "quantize_tokens",
    "quantize_weight_for_both",
    "quantize_weight_for_dgrad",
    "quantize_weight_for_forward",
    "quantize_weight_into",
]
