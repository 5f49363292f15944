"""Scale-free measures of agreement."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and every bit: NaN payloads and signs of zero count."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bits = getattr(torch, f"int{actual.dtype.itemsize * 8}")
    different = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    count = int(different.sum())
    assert count == 0, f"{count} of {different.numel()} elements differ, the first at {different.nonzero()[0].tolist()}"


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB. An all-zero `actual` scores 0; infinity is equality."""
    signal, noise = expected.detach().double(), actual.detach().double() - expected.detach().double()
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


def worst_row_sqnr(actual: Tensor, expected: Tensor) -> float:
    """The smallest SQNR of any row (last dimension) that is not zero in `expected`: no small row can hide."""
    signal, noise = expected.detach().double(), actual.detach().double() - expected.detach().double()
    power = signal.square().sum(-1)
    ratio = power / noise.square().sum(-1)
    return float(10 * torch.log10(ratio[power > 0].min()))


@contextmanager
def recording_saved_tensors() -> Iterator[list[Tensor]]:
    """The list of what autograd saves for backward inside the context, as it is saved."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved
