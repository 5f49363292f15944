"""Kernel: the codes of a weight, transposed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import launch


@triton.jit
def transpose_codes_kernel(
    codes,  # uint8 (E, N, K) contiguous
    transposed,  # uint8 (E, K, N) contiguous
    N, K,
):  # fmt: skip
    """One program does a block of 128 x 128."""
    k_blocks = K // 128
    n_blocks = N // 128
    block = tl.program_id(0)
    n = (block // k_blocks % n_blocks).to(tl.int64) * 128 + tl.arange(0, 128)
    k = (block % k_blocks).to(tl.int64) * 128 + tl.arange(0, 128)
    expert = (block // k_blocks // n_blocks).to(tl.int64) * N * K
    tile = tl.load(codes + expert + n[:, None] * K + k[None, :])
    tl.store(transposed + expert + k[:, None] * N + n[None, :], tl.trans(tile))


def launch_transpose_codes(codes: Tensor, transposed: Tensor) -> None:
    """`(E, N, K)` to `(E, K, N)`, of one byte an element, both contiguous, `N` and `K` multiples of 128."""
    _, n, k = codes.shape
    blocks = codes.numel() // 128**2
    if blocks:
        launch(transpose_codes_kernel, blocks, codes.view(torch.uint8), transposed.view(torch.uint8), n, k, num_warps=4)
