from fp8moe.quantize.swiglu import quantize_swiglu, quantize_swiglu_and_measure  # noqa: F401
