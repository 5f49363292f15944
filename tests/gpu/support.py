"""What the tests on a GPU share: problems there, and the means to spoil and to watch the device."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fp8moe import FP8Config, KernelPreference
from fp8moe.gemm.base import Gemm
from fp8moe.gemm.select import BACKENDS
from tests.generators import offsets

EMULATED = FP8Config(kernel_preference=KernelPreference.EMULATED)


def emulation_of(config: FP8Config) -> FP8Config:
    """What the emulation must compute to compute what `config` does: the tiles that its backend takes, too."""
    takes_short = config.wgrad_token_tile is None and config.kernel_preference is KernelPreference.DEEPGEMM
    emulated = replace(config, kernel_preference=KernelPreference.EMULATED)
    return replace(emulated, wgrad_token_tile=128) if takes_short else emulated


def lacks(preference: KernelPreference) -> str:
    """Why a backend cannot be tested here; empty if it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return " ".join({str(lack): None for gemm in Gemm for lack in BACKENDS[preference].missing(gemm, device)})


def problem(
    sizes: list[int], n: int = 384, k: int = 256, unused_rows: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activation `(M, K)`, weight `(E, N, K)`, offsets and output gradient `(M, N)`, on the GPU."""
    num_tokens = sum(sizes) + unused_rows
    a = torch.randn(num_tokens, k, device="cuda").to(dtype)
    w = torch.randn(len(sizes), n, k, device="cuda").to(dtype)
    return a, w, offsets(sizes, "cuda"), torch.randn(num_tokens, n, device="cuda").to(dtype)


def poison_free_memory() -> None:
    """Leave NaN in what the allocator hands out next."""
    torch.full((1 << 28,), torch.nan, device="cuda")


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
