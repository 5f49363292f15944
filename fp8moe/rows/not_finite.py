"""Noting on the device where results were first not finite."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fp8moe.devices import runs_triton


def note_not_finite(
    x: Tensor, x_every: int, y: Tensor | None, y_every: int, first: Tensor, when: int
) -> None:  # fmt: skip
    """Note whether `x`, and `y`, hold NaN or infinity. One launch, and the host does not wait.

    It is no operator of PyTorch: whoever traces is to see nothing of it, and it must cost the host next to nothing.

    Args:
        x, y: `(rows, columns)`, both of the same shape, in any float dtypes and strides; `y` may be None.
        x_every, y_every: of its columns, each so many-th is looked at, the first included.
        first: int64 `(1,)`, with `y` `(2,)`: zero, or when that of `x`, and of `y`, was not finite for the first time.
            It is kept where it is not zero.
        when: now, above zero.
    """
    if runs_triton(x.device):
        _launcher()(x, x_every, y, y_every, first, when)
    else:
        note_by_torch(x, x_every, y, y_every, first, when)


@cache
def _launcher() -> Callable[[Tensor, int, Tensor | None, int, Tensor, int], None]:
    """Imported once: to look for it again takes a third as long as the launch."""
    from fp8moe.kernels.not_finite import launch_note_not_finite

    return launch_note_not_finite


@torch.no_grad()
def note_by_torch(
    x: Tensor, x_every: int, y: Tensor | None, y_every: int, first: Tensor, when: int
) -> None:  # fmt: skip
    """The definition."""
    for number, (values, every) in enumerate(((x, x_every),) if y is None else ((x, x_every), (y, y_every))):
        is_finite = values[:, ::every].isfinite().all()
        first[number].masked_fill_((first[number] == 0) & ~is_finite, when)
