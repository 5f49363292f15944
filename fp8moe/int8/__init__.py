"""Quantized experts for inference: INT8 x INT8 and INT8 x INT4 with group scales, exact where integers are.

For GPUs without FP8 tensor cores; docs/int8.md says when to use it. Nothing here has a gradient.
"""

from fp8moe.int8.checks import Rounding
from fp8moe.int8.grouped_mm import int8_grouped_mm
from fp8moe.int8.groups import RowTiles, plan_tiles
from fp8moe.int8.layer import Int8Experts, QuantizedExperts, int8_moe_forward, quantize_experts, quantize_module
from fp8moe.int8.rows import quantize_rows_int8, smooth_quantize_rows_int8, swiglu_quantize_int8
from fp8moe.int8.scaled_mm import int8_scaled_mm
from fp8moe.int8.weights import QuantizedWeight, pack_int4, quantize_weight, unpack_int4

__all__ = [
    "Int8Experts",
    "QuantizedExperts",
    "QuantizedWeight",
    "Rounding",
    "RowTiles",
    "int8_grouped_mm",
    "int8_moe_forward",
    "int8_scaled_mm",
    "pack_int4",
    "plan_tiles",
    "quantize_experts",
    "quantize_module",
    "quantize_rows_int8",
    "quantize_weight",
    "smooth_quantize_rows_int8",
    "swiglu_quantize_int8",
    "unpack_int4",
]
