"""Whether a result is right: what is wrong is never timed."""

from collections.abc import Iterable

import torch
from torch import Tensor

MIN_SQNR_DB = 20.0
"""FP8 in tiles of 128 gives 27 dB on random data; a hundredth of the rows left out gives 20."""
MIN_ROW_SQNR_DB = 10.0
"""For each row by itself: a row that was not written, or written twice, gives 0 dB or less."""
EXACT_DB = 150.0
"""Stands for equality, so that every figure is a number."""
OUT = "out"
"""The name of the output among the products; every other one is a gradient."""


class WrongResultError(RuntimeError):
    """A variant or a kernel computed something else than it should."""


def check(name: str, actual: Tensor, expected: Tensor, min_sqnr_db: float = MIN_SQNR_DB) -> float:
    """The signal-to-quantization-noise ratio of `actual`, in dB, any shape.

    It must be at least `min_sqnr_db`, and `MIN_ROW_SQNR_DB` in each row (last dimension). A row of zeros must be zeros.

    Raises:
        WrongResultError: not close enough, or not of the same shape and dtype.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise WrongResultError(
            f"{name} is {actual.dtype} {tuple(actual.shape)}; it must be {expected.dtype} {tuple(expected.shape)}"
        )
    signal = expected.float()
    noise_power = (actual.float() - signal).square().sum(-1)
    signal_power = signal.square().sum(-1)
    whole, worst_row = _decibels(signal_power.sum(), noise_power.sum()), _decibels(signal_power, noise_power)
    if not (whole >= min_sqnr_db and worst_row >= MIN_ROW_SQNR_DB):  # of NaN neither is true
        raise WrongResultError(
            f"{name} is wrong: SQNR {whole:.1f} dB, worst row {worst_row:.1f} dB; "
            f"they must be at least {min_sqnr_db:g} and {MIN_ROW_SQNR_DB:g} dB"
        )
    return whole


def poison_freed_memory(like: Iterable[Tensor]) -> None:
    """Fill with NaN, and free, as much memory as `like` takes: the next outputs of those sizes are likely to lie there.

    So a kernel that writes nothing cannot pass with what an earlier one left.
    """
    poisoned = [torch.full_like(tensor, torch.nan) for tensor in like]
    del poisoned


def _decibels(signal_power: Tensor, noise_power: Tensor) -> float:
    ratio = torch.where(noise_power == 0, torch.inf, signal_power / noise_power)
    return float((10 * torch.log10(ratio)).clamp(max=EXACT_DB).min())
