"""Kernel: sums over the rows of each expert, from those of its blocks of 128 padded rows."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch
from fp8moe.operands import TokenGroups

BLOCKS, FEATURES = 32, 32
"""What a program adds at a time. Its features are few, so that there are enough programs for a few experts."""


@triton.jit
def block_sums_kernel(
    block_sums,  # fp32 (CAPACITY / 128, NUM_FEATURES)
    padded_ends,  # TokenGroups
    sums,  # fp32 (E, NUM_FEATURES)
    NUM_FEATURES,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One program adds up FEATURES features of an expert, in an order that its number of rows alone decides."""
    feature_blocks = tl.cdiv(NUM_FEATURES, FEATURES)
    expert = tl.program_id(0) // feature_blocks
    features = tl.program_id(0) % feature_blocks * FEATURES + tl.arange(0, FEATURES)
    first = tl.load(padded_ends + expert - 1, mask=expert > 0, other=0) // 128
    end = tl.load(padded_ends + expert) // 128
    total = tl.zeros((BLOCKS, FEATURES), tl.float32)
    for start in range(first, end, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        inside = (blocks < end)[:, None] & (features < NUM_FEATURES)[None, :]
        offsets = blocks.to(tl.int64)[:, None] * NUM_FEATURES + features[None, :]
        total += tl.load(block_sums + offsets, mask=inside, other=0.0)
    tl.store(sums + expert.to(tl.int64) * NUM_FEATURES + features, tl.sum(total, 0), mask=features < NUM_FEATURES)


def launch_block_sums(block_sums: Tensor, groups: TokenGroups, sums: Tensor) -> None:
    """Of `block_sums` fp32 `(R/128, D)` what belongs to each expert, into `sums` fp32 `(E, D)`; zeros without rows."""
    num_experts, num_features = sums.shape
    launch(
        block_sums_kernel, num_experts * ceil_div(num_features, FEATURES),
        block_sums, groups.padded_ends, sums, num_features,
        BLOCKS=BLOCKS, FEATURES=FEATURES,
        num_warps=4,
    )  # fmt: skip
