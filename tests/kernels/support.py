"""What the kernels' tests share."""

import pytest
import torch

from fp8moe.devices import runs_hopper_kernels

needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and runs_hopper_kernels(torch.device("cuda"))), reason="needs a Hopper GPU"
)
"""For kernels in Gluon, which cannot be interpreted."""
