from fp8moe.quantize.swiglu import quantize_swiglu_backward  # noqa: F401
