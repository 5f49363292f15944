"""Activations to int8: rows as they are, smoothed by the scales of their expert, or as SwiGLU makes them.

They are quantized before the product, each once: the GEMM gathers codes.
"""

import torch
from torch import Tensor

from fp8moe.checks import check_float, check_same_device, check_tensors
from fp8moe.devices import runs_triton
from fp8moe.gate import SWIGLU
from fp8moe.int8.checks import (
    Rounding,
    check_matrix,
    check_no_gradient,
    check_rounding,
    check_size,
    check_vector,
)
from fp8moe.int8.reference import INT8_LEVELS, quantize_tiles
from fp8moe.quantize.gated import activation
from fp8moe.torch_op import torch_op

LAYOUTS = ("gate_up", "up_gate")


def quantize_rows_int8(
    x: Tensor, block_k: int | None = None, *, rounding: Rounding = Rounding.HALF_TO_EVEN
) -> tuple[Tensor, Tensor]:
    """Quantize each row, or each tile of `block_k` features of a row, with a scale of its own.

    Args:
        x: bf16, fp16 or fp32 `(M, K)`.
        block_k: features of a tile (the last may be shorter); None: the whole row.
        rounding: of what lies in the middle between two codes.

    Returns:
        codes: int8 `(M, K)`, -127..127.
        scale: fp32 `(M, 1)`, or `(M, ceil(K / block_k))`; `x ~= codes * scale`. 1 for zeros; NaN, with codes of 0,
            where a tile has a NaN or an infinity.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
    """
    check_matrix(x, "x")
    if block_k is not None:
        check_size(block_k, "block_k")
    check_no_gradient(x=x)
    codes, scale = int8_quantize_rows(x, block_k or x.shape[1], INT8_LEVELS, check_rounding(rounding))
    return codes, scale


def smooth_quantize_rows_int8(
    x: Tensor,
    inv_smooth: Tensor,
    offsets: Tensor,
    block_k: int | None = None,
    *,
    row_source: Tensor | None = None,
    rounding: Rounding = Rounding.HALF_TO_EVEN,
) -> tuple[Tensor, Tensor]:
    """SmoothQuant: each row, times the inverse smoothing scales of its expert (in fp32), is quantized.

    Args:
        x: bf16, fp16 or fp32 `(M, K)`; with a `row_source` any number of rows, such as the tokens.
        inv_smooth: float `(E, K)`: what to multiply the features of an expert's rows by.
        offsets: int32 `(E,)`: end row of each expert, non-decreasing.
        block_k, rounding: as in `quantize_rows_int8`.
        row_source: int32 `(M,)`: the row of `x` that each row is.

    Returns:
        codes, scale: as of `quantize_rows_int8`; rows from `offsets[-1]` on are zeros.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
    """
    check_matrix(x, "x")
    check_tensors({"inv_smooth": inv_smooth, "offsets": offsets})
    if inv_smooth.dim() != 2 or inv_smooth.shape[1] != x.shape[1]:
        raise ValueError(f"inv_smooth has shape {tuple(inv_smooth.shape)}; it must be (E, {x.shape[1]}), as x has it")
    check_float(inv_smooth, "inv_smooth")
    check_same_device(inv_smooth, "inv_smooth", x, "x")
    check_vector(offsets, "offsets", inv_smooth.shape[0], torch.int32, x, "x")
    if row_source is not None:
        check_vector(row_source, "row_source", row_source.numel(), torch.int32, x, "x")
    if block_k is not None:
        check_size(block_k, "block_k")
    check_no_gradient(x=x, inv_smooth=inv_smooth)
    tile, away = block_k or x.shape[1], check_rounding(rounding)
    codes, scale = int8_quantize_rows(x, tile, INT8_LEVELS, away, inv_smooth, offsets, row_source)
    return codes, scale


def swiglu_quantize_int8(
    gate_up: Tensor,
    layout: str = "gate_up",
    block_k: int | None = None,
    *,
    quantized: bool = True,
    rounding: Rounding = Rounding.HALF_TO_EVEN,
) -> tuple[Tensor, Tensor] | Tensor:
    """`silu(gate) * up`, computed in fp32, and quantized from there.

    Args:
        gate_up: bf16, fp16 or fp32 `(M, 2I)`.
        layout: "gate_up" if the gate's features are the first half, "up_gate" if they are the second.
        block_k, rounding: as in `quantize_rows_int8`.
        quantized: False returns the activation in the dtype of `gate_up` instead, `(M, I)`.

    Returns:
        codes int8 `(M, I)` and scale fp32, as of `quantize_rows_int8`; or the activation.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
    """
    check_matrix(gate_up, "gate_up")
    check_layout(layout)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; its features must be two halves, gate and up")
    if block_k is not None:
        check_size(block_k, "block_k")
    check_no_gradient(gate_up=gate_up)
    up_first, away = layout == "up_gate", check_rounding(rounding)
    if not quantized:
        return _int8_swiglu(gate_up, up_first)
    codes, scale = _int8_swiglu_quantize(gate_up, up_first, block_k or gate_up.shape[1] // 2, away)
    return codes, scale


def check_layout(layout: object) -> None:
    """Of gate and up."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")


def smoothed(x: Tensor, inv_smooth: Tensor | None, offsets: Tensor | None, row_source: Tensor | None) -> Tensor:
    """fp32 `(M, K)`: what `int8_quantize_rows` quantizes, in plain PyTorch."""
    values = x.float() if row_source is None else x.float()[row_source.long()]
    if inv_smooth is None or offsets is None:
        return values
    rows = torch.arange(values.shape[0], dtype=torch.int32, device=x.device)
    expert = torch.bucketize(rows, offsets, right=True)
    live = expert < offsets.shape[0]
    # Rows of no group may hold anything, NaN too.
    return torch.where(live[:, None], values * inv_smooth.float()[expert.clamp(max=offsets.shape[0] - 1)], 0.0)


def swiglu_values(gate_up: Tensor, up_first: bool) -> Tensor:
    """fp32 `(M, I)`: SwiGLU in plain PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return activation(SWIGLU, up, gate) if up_first else activation(SWIGLU, gate, up)


def _empty_codes(
    x: Tensor, tile: int, levels: int, away: bool,
    inv_smooth: Tensor | None = None, offsets: Tensor | None = None, row_source: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    num_rows, num_features = x.shape[0] if row_source is None else row_source.shape[0], x.shape[1]
    return _empty_tiles(x, num_rows, num_features, tile)


def _empty_tiles(x: Tensor, num_rows: int, num_features: int, tile: int) -> list[Tensor]:
    codes = x.new_empty((num_rows, num_features), dtype=torch.int8)
    return [codes, x.new_empty((num_rows, -(-num_features // tile)), dtype=torch.float32)]


@torch_op(fake=_empty_codes)
def int8_quantize_rows(
    x: Tensor, tile: int, levels: int, away: bool,
    inv_smooth: Tensor | None = None, offsets: Tensor | None = None, row_source: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Codes and scales, of any number of levels up to 127; the operator behind the quantizers."""
    if runs_triton(x.device):
        from fp8moe.kernels.int8.rows import launch_quantize_rows

        codes, scale = _empty_codes(x, tile, levels, away, inv_smooth, offsets, row_source)
        if codes.shape[0]:
            smooth = None if inv_smooth is None else inv_smooth.contiguous()
            ends = None if inv_smooth is None or offsets is None else offsets.contiguous()
            source = None if row_source is None else row_source.contiguous()
            launch_quantize_rows(with_contiguous_rows(x), codes, scale, tile, levels, away, smooth, ends, source)
        return [codes, scale]
    return list(quantize_tiles(smoothed(x, inv_smooth, offsets, row_source), tile, levels, away))


def _empty_swiglu_codes(gate_up: Tensor, up_first: bool, tile: int, away: bool) -> list[Tensor]:
    return _empty_tiles(gate_up, gate_up.shape[0], gate_up.shape[1] // 2, tile)


@torch_op(fake=_empty_swiglu_codes)
def _int8_swiglu_quantize(gate_up: Tensor, up_first: bool, tile: int, away: bool) -> list[Tensor]:
    if runs_triton(gate_up.device):
        from fp8moe.kernels.int8.rows import launch_quantize_rows

        codes, scale = _empty_swiglu_codes(gate_up, up_first, tile, away)
        if codes.shape[0]:
            gate, up = gate_of(with_contiguous_rows(gate_up), up_first)
            launch_quantize_rows(gate, codes, scale, tile, INT8_LEVELS, away, up=up)
        return [codes, scale]
    return list(quantize_tiles(swiglu_values(gate_up, up_first), tile, INT8_LEVELS, away))


def _empty_swiglu(gate_up: Tensor, up_first: bool) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch_op(fake=_empty_swiglu)
def _int8_swiglu(gate_up: Tensor, up_first: bool) -> Tensor:
    if runs_triton(gate_up.device):
        from fp8moe.kernels.int8.rows import launch_quantize_rows

        out = _empty_swiglu(gate_up, up_first)
        if out.shape[0]:
            gate, up = gate_of(with_contiguous_rows(gate_up), up_first)
            launch_quantize_rows(gate, out, None, out.shape[1], INT8_LEVELS, False, up=up)
        return out
    return swiglu_values(gate_up, up_first).to(gate_up.dtype)


def gate_of(gate_up: Tensor, up_first: bool) -> tuple[Tensor, int]:
    """The gate's half, and how far behind it up lies."""
    half = gate_up.shape[1] // 2
    return (gate_up[:, half:], -half) if up_first else (gate_up, half)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """As kernels read them: the features of a row side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
