"""The dtype in which an op returns its result."""

import torch
from torch import Tensor


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x`; under autocast the autocast dtype."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
