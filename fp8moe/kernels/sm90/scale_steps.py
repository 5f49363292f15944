"""Kernel: from the scales of long token tiles to the steps by which wgrad carries its sums from tile to tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch

FEATURES = 1024
EXPERTS = 256
FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def scale_steps_kernel(
    scale,  # fp32 (blocks, NUM_FEATURES)
    padded_ends,  # int32 (E,)
    steps,  # fp32 (blocks, NUM_FEATURES)
    blocks, NUM_FEATURES, E,
    FEATURES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program does FEATURES features of one block of 128 tokens."""
    feature_blocks = tl.cdiv(NUM_FEATURES, FEATURES)
    block = tl.program_id(0) // feature_blocks
    feature = tl.program_id(0) % feature_blocks * FEATURES + tl.arange(0, FEATURES)
    groups_that_end = 0
    for start in range(0, E, EXPERTS):
        expert = start + tl.arange(0, EXPERTS)
        end = tl.load(padded_ends + expert, mask=expert < E, other=0)
        groups_that_end += tl.sum((end == (block + 1) * 128).to(tl.int32), 0)
    goes_on = (groups_that_end == 0) & (block + 1 < blocks)
    place = block.to(tl.int64) * NUM_FEATURES + feature
    inside = feature < NUM_FEATURES
    this = tl.load(scale + place, mask=inside, other=1.0)
    following = tl.load(scale + place + NUM_FEATURES, mask=inside & goes_on, other=1.0)
    # Finite, so that a sum of zero stays zero.
    step = tl.minimum(tl.div_rn(this, following), FP32_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(steps + place, step, mask=inside)


def launch_scale_steps(scale: Tensor, padded_ends: Tensor) -> Tensor:
    """What wgrad multiplies its sums by behind each block of 128 tokens: `scale[b] / scale[b + 1]`, and behind the last
    block of a group `scale[b]`.

    Within a tile, whose blocks have one scale, that is 1. Blocks of no group get anything.

    Args:
        scale: fp32 `(R/128, D)`, contiguous, not empty.
        padded_ends: int32 `(E,)`.

    Returns:
        fp32 `(R/128, D)`, at most the largest finite number, or NaN.
    """
    blocks, num_features = scale.shape
    steps = torch.empty_like(scale)
    launch(
        scale_steps_kernel, blocks * ceil_div(num_features, FEATURES),
        scale, padded_ends, steps, blocks, num_features, padded_ends.shape[0],
        FEATURES=FEATURES, EXPERTS=EXPERTS, num_warps=4,
    )  # fmt: skip
    return steps
