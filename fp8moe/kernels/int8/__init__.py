"""Kernels of `fp8moe.int8`: in Triton alone, for every GPU that it compiles for."""
