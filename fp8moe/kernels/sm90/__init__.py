"""Kernels for compute capability 9.0 (Hopper), in Gluon, Triton's low-level language."""
