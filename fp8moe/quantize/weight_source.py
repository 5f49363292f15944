"""Whatever holds the FP8 operands of a weight between products, and how operators find it.

An operator takes tensors and plain values. So it gets a handle, and asks for the source behind it when it runs.
"""

import itertools
from abc import ABC, abstractmethod
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import WeightOperand
from fp8moe.quantize.weights import Split


class WeightSource(ABC):
    """The operands of one weight `(E, N, K)`. Autograd and operators do not hold it: its owner must."""

    handle: Tensor
    """int64 `(2,)` on the CPU: the number by which operators find this source, and -1 (see `handle_after_use`). A
    Python number would be a constant of compiled code: one compilation for each source."""
    _uses: int
    """How often it was looked whether the weight has changed."""

    def _register(self) -> None:
        number = next(_numbers)
        self.handle = torch.tensor([number, -1], device="cpu")
        self._uses = 0
        _sources[number] = self

    @abstractmethod
    def operand(
        self, w: Tensor, scale_format: ScaleFormat, *, for_dgrad: bool, since: int = -1, split: Split = Split.WHOLE
    ) -> WeightOperand:
        """The operand of forward or dgrad. No operator: for use within operators.

        Args:
            w: the weight, without gradient, or what stands for it.
            scale_format: as in `FP8Config`.
            for_dgrad: which of the two.
            since: of `handle_after_use`.
            split: into which parts the weight is divided; always the same for one source.
        """


def source_of(handle: Tensor) -> tuple[WeightSource, int]:
    """The source whose `handle` this is, and for `handle_after_use` the use (else -1).

    Raises:
        RuntimeError: nobody holds the source any more.
    """
    number, use = handle.tolist()
    source = _sources.get(number)
    if source is None:
        raise RuntimeError(
            "the WeightCache that forward used is gone, and backward needs it: keep it for as long as the weight"
        )
    return source, use


def handle_after_use(handle: Tensor) -> Tensor:
    """The handle for the backward of a forward that has just used the source: if nobody uses it in between, backward
    need not look again. (In compiled code it does.)"""
    if torch.compiler.is_compiling():
        return handle
    source, _ = source_of(handle)
    return torch.tensor([int(handle[0]), source._uses], device="cpu")


_sources: "WeakValueDictionary[int, WeightSource]" = WeakValueDictionary()
_numbers = itertools.count()
