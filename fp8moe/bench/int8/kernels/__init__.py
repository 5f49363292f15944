"""Kernels that exist to be measured against: what those of `fp8moe.int8` do in another way."""
