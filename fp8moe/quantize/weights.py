"""Weights to the operands of forward and dgrad."""

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import multiprocessors, runs_triton_fp8
from fp8moe.operands import BLOCK, WeightOperand, in_whole_blocks
from fp8moe.quantize import reference
from fp8moe.torch_op import torch_op


class Split(Enum):
    """Into which parts a weight `(E, N, K)` is divided along `N`. The operand pads each of them by itself, so that gate
    and up are the two halves of its product, each of whole blocks."""

    WHOLE = "whole"
    """One part."""
    HALVES = "halves"
    """The first half of the rows, and the second."""
    INTERLEAVED = "interleaved"
    """The rows with even numbers, and those with odd ones."""

    def parts(self, w: Tensor) -> list[Tensor]:
        """Views of `w`, side by side along `N`; one where nothing would lie between two."""
        half = w.shape[1] // 2
        if self is Split.WHOLE or (self is Split.HALVES and half % BLOCK == 0):
            return [w]
        return [w[:, :half], w[:, half:]] if self is Split.HALVES else [w[:, 0::2], w[:, 1::2]]

    def padded(self, n: int) -> int:
        """How many features the operand of a weight with `n` has."""
        return in_whole_blocks(n) if self is Split.WHOLE else 2 * in_whole_blocks(n // 2)


def quantize_weight_for_forward(
    w: Tensor | Sequence[Tensor], scale_format: ScaleFormat, split: Split = Split.WHOLE
) -> WeightOperand:
    """Quantize a weight in 128 x 128 blocks, for forward: `(E, N, K)`.

    Args:
        w: bf16, fp16 or fp32 `(E, N, K)`, any strides; or several, `(E, N_i, K)`, which are quantized as one, stacked
            along `N`, without a high-precision copy. In the operand `K` and each `N_i` are multiples of 128.
        scale_format: as in `FP8Config`.
        split: into which parts each of them is divided.
    """
    scale, data = _quantize_weight(_as_list(w), split.value, True, False, scale_format.value)
    return WeightOperand(data, scale)


def quantize_weight_for_dgrad(
    w: Tensor | Sequence[Tensor], scale_format: ScaleFormat, split: Split = Split.WHOLE
) -> WeightOperand:
    """The same for dgrad: `(E, K, N)`."""
    scale, data = _quantize_weight(_as_list(w), split.value, False, True, scale_format.value)
    return WeightOperand(data, scale.transpose(1, 2))


def quantize_weight_for_both(
    w: Tensor | Sequence[Tensor], scale_format: ScaleFormat, split: Split = Split.WHOLE
) -> tuple[WeightOperand, WeightOperand]:
    """Both operands, for forward and for dgrad, from one read: two thirds of the time of one after the other."""
    scale, forward, dgrad = _quantize_weight(_as_list(w), split.value, True, True, scale_format.value)
    return WeightOperand(forward, scale), WeightOperand(dgrad, scale.transpose(1, 2))


def _as_list(w: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [w] if isinstance(w, Tensor) else list(w)


def _empty_weight_operands(
    weights: Sequence[Tensor], split: str, forward: bool, dgrad: bool, scale_format: str
) -> list[Tensor]:
    num_experts, _, k = weights[0].shape
    n, k = sum(Split(split).padded(w.shape[1]) for w in weights), in_whole_blocks(k)
    device = weights[0].device
    operands = [torch.empty((num_experts, n // BLOCK, k // BLOCK), dtype=torch.float32, device=device)]
    if forward:
        operands.append(torch.empty((num_experts, n, k), dtype=torch.float8_e4m3fn, device=device))
    if dgrad:
        operands.append(torch.empty((num_experts, k, n), dtype=torch.float8_e4m3fn, device=device))
    return operands


@torch_op(fake=_empty_weight_operands)
def _quantize_weight(
    weights: Sequence[Tensor], split: str, forward: bool, dgrad: bool, scale_format: str
) -> list[Tensor]:
    operands = _empty_weight_operands(weights, split, forward, dgrad, scale_format)
    scale, forward_data, dgrad_data = operands[0], operands[1] if forward else None, operands[-1] if dgrad else None
    quantize_weight_into(weights, ScaleFormat(scale_format), scale, forward_data, dgrad_data, split=Split(split))
    return operands


def quantize_weight_into(
    w: Tensor | Sequence[Tensor],
    scale_format: ScaleFormat,
    scale: Tensor,
    forward_data: Tensor | None,
    dgrad_data: Tensor | None,
    changed: Tensor | None = None,
    split: Split = Split.WHOLE,
) -> None:
    """Quantize `w` into existing memory. Not an operator itself: operators call it.

    Args:
        w, scale_format, split: as in `quantize_weight_for_forward`.
        scale: fp32 `(E, N/128, K/128)`, for `N` and `K` in whole blocks.
        forward_data, dgrad_data: e4m3 `(E, N, K)` and `(E, K, N)`, likewise; skipped if None. The last dimension of
            these is contiguous.
        changed: int32, on the device: nothing is done if all of it is 0. If it is None, `w` is quantized in any case.
    """
    pieces = [piece for weight in _as_list(w) for piece in _pieces(weight, split)]
    if len(pieces) == 1:  # the usual case, without views
        _quantize_part_into(*pieces[0], scale_format, scale, forward_data, dgrad_data, changed)
        return
    start = 0
    for part, pairs in pieces:
        n = split.padded(part.shape[1]) if pairs else in_whole_blocks(part.shape[1])
        _quantize_part_into(
            part,
            pairs,
            scale_format,
            scale.narrow(1, start // BLOCK, n // BLOCK),
            None if forward_data is None else forward_data.narrow(1, start, n),
            None if dgrad_data is None else dgrad_data.narrow(2, start, n),
            changed,
        )
        start += n


def _pieces(w: Tensor, split: Split) -> list[tuple[Tensor, bool]]:
    """What is quantized by itself of `w`, and whether that is two parts, which lie in memory as pairs."""
    if split is Split.INTERLEAVED and _has_kernel(w) and _are_pairs(w):
        return [(w, True)]
    return [(part, False) for part in split.parts(w)]


def _has_kernel(w: Tensor) -> bool:
    return runs_triton_fp8(w.device) and 1 not in w.shape[1:]  # see `missing_for_sizes` of TritonGemm


def _are_pairs(w: Tensor) -> bool:
    """Whether the rows of `w` `(E, N, K)`, of which those with even and odd numbers are two parts, lie side by side in
    memory, as those of interleaved weights stored `(E, K, N)` do, in whole vectors of 16 pairs."""
    return (
        w.stride(1) == 1 < w.stride(2)
        and all(number % 32 == 0 for number in (w.shape[1], w.stride(0), w.stride(2)))
        and w.data_ptr() % 16 == 0
    )


def _quantize_part_into(
    w: Tensor,
    pairs: bool,
    scale_format: ScaleFormat,
    scale: Tensor,
    forward_data: Tensor | None,
    dgrad_data: Tensor | None,
    changed: Tensor | None,
) -> None:
    if _has_kernel(w):
        from fp8moe.kernels.weights import launch_quantize_weight

        launch_quantize_weight(
            w, forward_data, dgrad_data, scale, pow2=scale_format is ScaleFormat.POW2, pairs=pairs,
            changed=changed, multiprocessors=multiprocessors(w.device),
        )  # fmt: skip
        return
    if changed is not None and not w.is_cuda and not changed.any():  # on a GPU this would wait for the device
        return
    forward_operand, dgrad_operand = reference.quantize_weight(w, scale_format)
    scale.copy_(forward_operand.scale)
    for data, operand in ((forward_data, forward_operand), (dgrad_data, dgrad_operand)):
        if data is not None:
            data.copy_(operand.data)
