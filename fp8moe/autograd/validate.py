"""Checks of what users pass in, made before any kernel starts. Every message names the argument, the value, the fix."""

import torch
from torch import Tensor

from fp8moe.operands import BLOCK
from fp8moe.weight_cache import WeightCache

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE_TYPES = ("cpu", "cuda")
MAX_ROWS = 2**31 - 1  # rows are numbered in int32


def check_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> None:
    """Check the arguments of `grouped_mm`; see there."""
    for name, value in (("a", a), ("b", b), ("offs", offs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
        if value.layout is not torch.strided:
            raise ValueError(f"{name} has layout {value.layout}; it must be dense: pass {name}.to_dense()")
    if a.dim() != 2:
        raise ValueError(f"a has shape {tuple(a.shape)}; it must be 2D, (M, K): all groups' rows one after the other")
    if b.dim() != 3:
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be 3D, (E, K, N): one matrix for each group")
    for name, value in (("a", a), ("b", b)):
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}")
    num_experts, k, n = b.shape
    if a.shape[1] != k:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}: a's last dimension must equal b's second; "
            "a weight stored (E, N, K) is passed as w.transpose(-2, -1)"
        )
    for name, size in (("K (a's last dimension, b's second)", k), ("N (b's last dimension)", n)):
        if size == 0 or size % BLOCK != 0:
            raise ValueError(f"{name} is {size}; it must be a positive multiple of {BLOCK}: pad the features")
    if num_experts == 0:
        raise ValueError(f"b has shape {tuple(b.shape)}; there must be at least one group")
    if a.shape[0] + BLOCK * num_experts > MAX_ROWS:
        raise ValueError(f"a has {a.shape[0]} rows; with padding they must be at most {MAX_ROWS}: split the batch")
    check_offs(offs, num_experts)
    if a.device.type not in DEVICE_TYPES:
        raise ValueError(f"a is on {a.device}; the device must be one of {', '.join(DEVICE_TYPES)}")
    for name, value in (("b", b), ("offs", offs)):
        if value.device != a.device:
            raise ValueError(f"{name} is on {value.device} and a on {a.device}; move them to the same device")


def check_offs(offs: Tensor, num_experts: int) -> None:
    """`offs` must be int32 `(E,)`; what it holds cannot be checked without reading the device (`check_offs_values`)."""
    if offs.dtype != torch.int32:
        raise TypeError(f"offs has dtype {offs.dtype}; it must be torch.int32: pass offs.to(torch.int32)")
    if offs.shape != (num_experts,):
        raise ValueError(
            f"offs has shape {tuple(offs.shape)}; it must be ({num_experts},): the end row of each of b's groups"
        )


def check_topk(topk_ids: object, num_experts: int) -> None:
    """`topk_ids` must be integers `(T, k)`; any value is valid, and one outside `0..E-1` means no expert."""
    if not isinstance(topk_ids, Tensor):
        raise TypeError(f"topk_ids is a {type(topk_ids).__name__}; it must be a torch.Tensor")
    if topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex or topk_ids.dtype is torch.bool:
        raise TypeError(f"topk_ids has dtype {topk_ids.dtype}; it must be an integer dtype: pass expert numbers")
    if topk_ids.dim() != 2 or topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}; it must be (T, k) with at least one choice k")
    if topk_ids.numel() + BLOCK * num_experts > MAX_ROWS:
        raise ValueError(
            f"topk_ids holds {topk_ids.numel()} choices; with padding they must be at most {MAX_ROWS}: split the batch"
        )


def check_main_grad(main_grad: object, b: Tensor) -> None:
    """`main_grad` must be None or what the gradient of a valid `b` can be added to in place."""
    if main_grad is None:
        return
    if not isinstance(main_grad, Tensor):
        raise TypeError(f"main_grad is a {type(main_grad).__name__}; it must be a torch.Tensor or None")
    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad has dtype {main_grad.dtype}; it must be torch.float32: gradients are summed in it")
    if main_grad.shape != b.shape:
        raise ValueError(
            f"main_grad has shape {tuple(main_grad.shape)}; it must be that of b, {tuple(b.shape)}; for a weight "
            "stored (E, N, K) it is passed as w.main_grad.transpose(-2, -1)"
        )
    if main_grad.device != b.device:
        raise ValueError(f"main_grad is on {main_grad.device} and b on {b.device}; move it to the same device")
    if main_grad.requires_grad:
        raise ValueError("main_grad requires a gradient itself; pass main_grad.detach()")
    if not main_grad.is_contiguous() and not main_grad.transpose(1, 2).is_contiguous():
        raise ValueError(
            f"main_grad has strides {main_grad.stride()}; it must be contiguous or the transpose of a contiguous "
            "(E, N, K): keep it as torch.zeros_like(w, dtype=torch.float32) for a contiguous w, transposed as b is"
        )


def check_weight_cache(weight_cache: object) -> None:
    """`weight_cache` must be None or a `WeightCache`; whether it is of the right weight shows when it is used."""
    if weight_cache is not None and not isinstance(weight_cache, WeightCache):
        raise TypeError(
            f"weight_cache is a {type(weight_cache).__name__}; it must be None or a fp8moe.WeightCache of the weight"
        )


def check_offs_values(offs: Tensor, num_tokens: int) -> None:
    """`FP8Config(debug=True)`: the ends must not decrease, and lie in 0..M.

    Raises:
        ValueError: on a CPU. On CUDA a device-side assertion fails instead, so that nothing waits for the device;
            compiled code on a CPU raises the same message as a RuntimeError.
    """
    ends = torch.cat([offs.new_zeros(1), offs, offs.new_full((1,), num_tokens)])
    valid = (ends.diff() >= 0).all()
    message = f"offs must not decrease and must lie in 0..{num_tokens} (the rows of a)"
    if offs.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(valid, message)
    elif not valid:
        raise ValueError(f"{message}; it is {offs.tolist()}")
