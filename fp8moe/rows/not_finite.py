"""Noting on the device where results were first not finite."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fp8moe.devices import runs_triton


def note_not_finite(x: Tensor, y: Tensor | None, every: int, first: Tensor, when: int) -> None:
    """Note whether `x`, and `y`, hold NaN or infinity. One launch, and the host does not wait.

    It is no operator of PyTorch: whoever traces is to see nothing of it, and it must cost the host next to nothing.

    Args:
        x, y: `(rows, columns)`, both of the same shape, in any float dtypes and strides; `y` may be None.
        every: of their columns, each so many-th is looked at, the first included.
        first: int64 `(1,)`, with `y` `(2,)`: zero, or when that of `x`, and of `y`, was not finite for the first time.
            It is kept where it is not zero.
        when: now, above zero.
    """
    if runs_triton(x.device):
        _launcher()(x, y, every, first, when)
    else:
        note_by_torch(x, y, every, first, when)


@cache
def _launcher() -> Callable[[Tensor, Tensor | None, int, Tensor, int], None]:
    """Imported once: to look for it again takes a third as long as the launch."""
    from fp8moe.kernels.not_finite import launch_note_not_finite

    return launch_note_not_finite


@torch.no_grad()
def note_by_torch(x: Tensor, y: Tensor | None, every: int, first: Tensor, when: int) -> None:
    """The definition."""
    for number, values in enumerate((x,) if y is None else (x, y)):
        is_finite = values[:, ::every].isfinite().all()
        first[number].masked_fill_((first[number] == 0) & ~is_finite, when)
