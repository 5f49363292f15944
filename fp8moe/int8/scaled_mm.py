"""The dense product of int8 matrices, with one scale a token and one a channel."""

import torch
from torch import Tensor

from fp8moe.checks import FLOAT_DTYPES, check_device, check_float, check_same_device, check_tensors
from fp8moe.devices import runs_triton
from fp8moe.int8.rows import with_contiguous_rows
from fp8moe.torch_op import torch_op

MAX_FEATURES = 2**17 - 1
"""More products of two int8 might not fit into int32."""


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`(a @ b) * a_scale * b_scale + bias`: exact int32 sums, scaled once in fp32, where the bias is added too.

    Args:
        a: int8 `(M, K)`, any strides. Where K is not contiguous, it is copied.
        b: int8 `(K, N)`, likewise; in `w.t()` of a weight `(N, K)` K is contiguous.
        a_scale: fp32 `(M,)` or `(M, 1)`.
        b_scale: fp32 `(N,)` or `(1, N)`.
        bias: bf16, fp16 or fp32 `(N,)`.
        out_dtype: bf16, fp16 or fp32.

    Returns:
        `(M, N)`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
    """
    tensors = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale}
    check_tensors(tensors if bias is None else {**tensors, "bias": bias})
    for name, matrix in (("a", a), ("b", b)):
        if matrix.dtype != torch.int8:
            raise TypeError(f"{name} has dtype {matrix.dtype}; it must be torch.int8")
        if matrix.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}; it must be a matrix")
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; they must be (M, K) and (K, N)")
    if not 1 <= a.shape[1] <= MAX_FEATURES:
        raise ValueError(f"a has shape {tuple(a.shape)}; K must be from 1 to {MAX_FEATURES}, for sums in int32")
    for name, scale, size, shapes in (
        ("a_scale", a_scale, a.shape[0], [(a.shape[0],), (a.shape[0], 1)]),
        ("b_scale", b_scale, b.shape[1], [(b.shape[1],), (1, b.shape[1])]),
    ):
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {scale.dtype}; it must be torch.float32")
        if tuple(scale.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(scale.shape)}; it must be ({size},)")
    if bias is not None:
        check_float(bias, "bias")
        if bias.shape != (b.shape[1],):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({b.shape[1]},)")
        check_same_device(bias, "bias", a, "a")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}")
    check_device(a, "a")
    for name, tensor in tensors.items():
        check_same_device(tensor, name, a, "a")
    return _int8_scaled_mm(a, b, a_scale.flatten(), b_scale.flatten(), bias, out_dtype)


def scaled_mm_in_fp64(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`int8_scaled_mm` in plain PyTorch: the definition. fp64 holds the sums exactly, and fuses as the kernel does."""
    sums = (a.double() @ b.double()).float()
    scale = b_scale * a_scale[:, None]
    if bias is None:
        return (sums * scale).to(out_dtype)
    return torch.addcmul(bias.double(), sums.double(), scale.double()).float().to(out_dtype)


def _empty_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@torch_op(fake=_empty_product, of_integers=True)
def _int8_scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    if not runs_triton(a.device):
        return scaled_mm_in_fp64(a, b, a_scale, b_scale, bias, out_dtype)
    from fp8moe.kernels.int8.platform import platform_of, scaled_tile
    from fp8moe.kernels.int8.scaled_mm import launch_int8_scaled_mm

    out = _empty_product(a, b, a_scale, b_scale, bias, out_dtype)
    if out.numel():
        platform = platform_of(a.device)
        block_rows, tile = scaled_tile(platform, a.shape[0], b.shape[1], a.shape[1])
        bias = None if bias is None else bias.contiguous()
        launch_int8_scaled_mm(
            with_contiguous_rows(a), with_contiguous_rows(b.t()), a_scale.contiguous(), b_scale.contiguous(), bias, out,
            block_rows=block_rows, tile=tile, in_fp16=platform.in_fp16,
        )  # fmt: skip
    return out
