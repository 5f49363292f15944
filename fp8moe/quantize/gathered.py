"""Weights of which only FP8 operands are at hand: that is how they were gathered from the ranks that store them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import WeightOperand
from fp8moe.quantize.transpose_codes import transpose_codes
from fp8moe.quantize.weight_source import WeightSource
from fp8moe.quantize.weights import Split


@dataclass(frozen=True)
class WeightForm:
    """As what experts take a parameter."""

    scale_format: ScaleFormat
    split: Split = Split.WHOLE
    stored_transposed: bool = False
    """Whether the parameter is `(E, K, N)`, for a weight `(E, N, K)`."""


class GatheredCodes(WeightSource):
    """The operands of a weight whose codes lie in memory that somebody else fills, frees and fills again.

    They lie there as one of the two operands; the other is made of it where it is needed: the same codes, transposed.
    """

    def __init__(self, form: WeightForm) -> None:
        self.form = form
        self._codes: Tensor | None = None
        self._scale: Tensor | None = None
        self._is_for_dgrad = False
        self._register()

    def hold(self, codes: Tensor, scale: Tensor, *, for_dgrad: bool) -> None:
        """What the memory holds from now on.

        Args:
            codes: e4m3 `(E, N, K)`, for dgrad `(E, K, N)`, in whole blocks, contiguous.
            scale: fp32 `(E, N/128, K/128)` in any case, contiguous.
            for_dgrad: which operand that is.
        """
        self._codes, self._scale, self._is_for_dgrad = codes, scale, for_dgrad

    def operand(
        self, w: Tensor, scale_format: ScaleFormat, *, for_dgrad: bool, since: int = -1, split: Split = Split.WHOLE
    ) -> WeightOperand:
        """As in `WeightSource`; `w` and `since` say nothing here.

        Raises:
            ValueError: it was quantized for another scale format, or divided otherwise.
            RuntimeError: the memory has been freed, and not been filled since.
        """
        for what, asked, held in (
            ("scale_format", scale_format, self.form.scale_format),
            ("split", split, self.form.split),
        ):
            if asked is not held:
                raise ValueError(
                    f"a weight is gathered in FP8 with {what} {held}, and the experts take {asked}: pass the config, "
                    "the gate and the order of gate and up with which they compute to gather_in_fp8"
                )
        if self._codes is None or self._scale is None or not self._codes.untyped_storage().size():
            raise RuntimeError(
                "a weight that is gathered in FP8 is used while FSDP has it sharded: call unshard() first"
            )
        codes = self._codes if for_dgrad is self._is_for_dgrad else transpose_codes(self._codes)
        return WeightOperand(codes, self._scale.transpose(1, 2) if for_dgrad else self._scale)


class GatheredPair(WeightSource):
    """The operands of two weights side by side along `N`. Joining them is a copy of the codes, in each product."""

    def __init__(self, parts: Sequence[WeightSource]) -> None:
        self.parts = tuple(parts)
        self._register()

    def operand(
        self, w: Tensor, scale_format: ScaleFormat, *, for_dgrad: bool, since: int = -1, split: Split = Split.WHOLE
    ) -> WeightOperand:
        """As in `GatheredCodes`."""
        operands = [part.operand(w, scale_format, for_dgrad=for_dgrad, split=split) for part in self.parts]
        codes = torch.cat([operand.data.view(torch.uint8) for operand in operands], 2 if for_dgrad else 1)
        stored = [operand.scale.transpose(1, 2) if for_dgrad else operand.scale for operand in operands]
        scale = torch.cat(stored, 1)  # (E, N/128, K/128)
        return WeightOperand(codes.view(torch.float8_e4m3fn), scale.transpose(1, 2) if for_dgrad else scale)


class GatheredWeight(Tensor):
    """A weight `(E, N, K)`, or as it is stored, of which there are codes alone. Experts of fp8moe can compute with it.

    It has shape, dtype and gradient of the weight in high precision, and none of its values: whatever asks for them
    gets an error. It may be transposed, and passed on.
    """

    codes: Tensor
    """e4m3, the memory of its `GatheredCodes`."""
    handle: Tensor
    """Of its `GatheredCodes`."""
    pair_handle: Tensor | None
    """Of the `GatheredPair` that it is part of."""
    is_oriented: bool
    """Whether its shape is `(E, N, K)`, and not transposed."""
    sources: tuple[WeightSource, ...]
    """What the handles are of, which nobody else may hold."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, codes: Tensor, handle: Tensor, pair_handle: Tensor | None, shape: Sequence[int], stride: Sequence[int],
        dtype: torch.dtype, is_oriented: bool, sources: tuple[WeightSource, ...] = (),
    ) -> "GatheredWeight":  # fmt: skip
        self: GatheredWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=dtype, device=codes.device
        )
        self.codes, self.handle, self.pair_handle = codes, handle, pair_handle
        self.is_oriented, self.sources = is_oriented, sources
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GatheredWeight({tuple(self.shape)}, {self.dtype}, in FP8)"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        names = ["codes", "handle"] if self.pair_handle is None else ["codes", "handle", "pair_handle"]
        return names, (self.dtype, self.is_oriented)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: tuple[torch.dtype, bool], shape: Sequence[int], stride: Sequence[int]
    ) -> "GatheredWeight":
        return GatheredWeight(inner["codes"], inner["handle"], inner.get("pair_handle"), shape, stride, *meta)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten, first = torch.ops.aten, args[0]
        if func in (aten.detach.default, aten.alias.default):
            return first._viewed(first.shape, first.stride(), first.is_oriented)
        if func is aten.view.default and tuple(args[1]) == tuple(first.shape):
            return first._viewed(first.shape, first.stride(), first.is_oriented)
        if func is aten.as_strided.default and _same_layout(first, *args[1:]):
            return first._viewed(first.shape, first.stride(), first.is_oriented)
        if func is aten.transpose.int and {dim % 3 for dim in args[1:]} == {1, 2}:
            shape, stride = first.shape, first.stride()
            return first._viewed((shape[0], *shape[:0:-1]), (stride[0], *stride[:0:-1]), not first.is_oriented)
        if func is aten.zeros_like.default:
            return torch.zeros(first.shape, dtype=first.dtype, device=first.device)
        if func is torch.ops.fp8moe.m_grouped_cached.default:  # what a trace calls in its place
            return func(*(arg.codes if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))
        raise RuntimeError(  # (A TypeError would become another one in `w + 1`.)
            f"{func} of a weight that FSDP gathers in FP8: its values in high precision are nowhere on this rank. "
            "Only swiglu_experts, moe_forward and ep_moe_forward can compute with it; leave weights that something "
            "else reads out of gather_in_fp8"
        )

    def _viewed(self, shape: Sequence[int], stride: Sequence[int], is_oriented: bool) -> "GatheredWeight":
        return GatheredWeight(
            self.codes, self.handle, self.pair_handle, shape, stride, self.dtype, is_oriented, self.sources
        )


def _same_layout(w: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    return tuple(shape) == tuple(w.shape) and tuple(stride) == tuple(w.stride()) and not offset


def as_saved(w: Tensor) -> Tensor:
    """What autograd saves of a weight: of one that is gathered its codes, which a hook may move like any tensor."""
    return w.codes if isinstance(w, GatheredWeight) and not torch.compiler.is_compiling() else w
