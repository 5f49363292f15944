"""High precision to the operands of the grouped GEMMs. `reference.py` defines every bit; the Triton kernels beside it
run on CUDA, the reference itself everywhere else.

Where a row lies is decided by `TokenGroups`; which layout a GEMM wants, by its backend (`fp8moe.gemm`).
"""

from fp8moe.quantize.dispatch import (
    dequantize_rows,
    quantize_rows,
    quantize_rows_and_tokens,
    quantize_tokens,
    quantize_weight,
    quantize_weight_for_dgrad,
    quantize_weight_for_forward,
    quantize_weight_into,
    requantize_rows_to_tokens,
)

__all__ = [
    "dequantize_rows",
    "quantize_rows",
    "quantize_rows_and_tokens",
    "quantize_tokens",
    "quantize_weight",
    "quantize_weight_for_dgrad",
    "quantize_weight_for_forward",
    "quantize_weight_into",
    "requantize_rows_to_tokens",
]
