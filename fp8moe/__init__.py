"""fp8moe: Mixture-of-Experts training in FP8."""

from fp8moe import monitor
from fp8moe.autograd.experts import swiglu_experts
from fp8moe.autograd.grouped_mm import grouped_mm
from fp8moe.autograd.moe import moe_forward
from fp8moe.config import ActivationStorage, FP8Config, KernelPreference, ScaleFormat
from fp8moe.gate import Gate
from fp8moe.gemm.base import BackendUnavailableError
from fp8moe.gemm.explain import explain
from fp8moe.integrations.convert import convert
from fp8moe.modules import SwiGLUExperts
from fp8moe.quantize.swiglu_quantize import QuantizedActivation, ScaleLayout, swiglu_quantize
from fp8moe.quantize.ue8m0 import pack_ue8m0, unpack_ue8m0
from fp8moe.quantize.weight_cache import WeightCache

__version__ = "0.1.0"

__all__ = [
    "ActivationStorage",
    "BackendUnavailableError",
    "FP8Config",
    "Gate",
    "KernelPreference",
    "QuantizedActivation",
    "ScaleFormat",
    "ScaleLayout",
    "SwiGLUExperts",
    "WeightCache",
    "convert",
    "explain",
    "grouped_mm",
    "moe_forward",
    "monitor",
    "pack_ue8m0",
    "swiglu_experts",
    "swiglu_quantize",
    "unpack_ue8m0",
]
