"""Device code: Triton kernels and their launchers.

The kernels of the operators in `X.py` are in `kernels/X.py`; what is written for one architecture is in the folder of
that architecture, under the same name. A kernel knows tensors and operand types, no operators and no gradients.
"""
