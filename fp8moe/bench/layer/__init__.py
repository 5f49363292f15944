"""The whole MoE layer: `fp8moe.moe_forward` beside the same layer in BF16.

The parts are those of the benchmark of one product: `shapes`, `problem`, `baseline` and `variants` (who computes),
`floor`, `kernels`, and `task`, which puts them together.
"""
