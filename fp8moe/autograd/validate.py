"""Checks of what users pass in, made before any kernel starts. Every message names the argument, the value, the fix."""

from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.main_grad import check_is_reduced_by_the_caller
from fp8moe.autograd.mlp_weights import NO_BIASES, NO_CACHES, NO_MAIN_GRADS
from fp8moe.checks import FLOAT_DTYPES, are_ordinary, check_device, check_float, check_same_device, check_tensors
from fp8moe.gate import Gate
from fp8moe.quantize.gathered import GatheredWeight
from fp8moe.quantize.weight_cache import WeightCache


def check_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> None:
    """Check the arguments of `grouped_mm`; see there."""
    if are_ordinary(a, b, offs) and _fit_each_other(a, b, offs):
        return
    check_tensors({"a": a, "b": b, "offs": offs})
    if isinstance(b, GatheredWeight):
        raise TypeError("b is gathered in FP8, which grouped_mm does not take: leave it out of gather_in_fp8")
    if a.dim() != 2:
        raise ValueError(f"a has shape {tuple(a.shape)}; it must be 2D, (M, K): all groups' rows one after the other")
    if b.dim() != 3:
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be 3D, (E, K, N): one matrix for each group")
    for name, value in (("a", a), ("b", b)):
        check_float(value, name)
    num_experts, k, n = b.shape
    if a.shape[1] != k:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}: a's last dimension must equal b's second; "
            "a weight stored (E, N, K) is passed as w.transpose(-2, -1)"
        )
    for name, size in (("K (a's last dimension, b's second)", k), ("N (b's last dimension)", n)):
        if size == 0:
            raise ValueError(f"{name} is 0; there must be at least one feature")
    if num_experts == 0:
        raise ValueError(f"b has shape {tuple(b.shape)}; there must be at least one group")
    check_offs(offs, num_experts)
    check_device(a, "a")
    for name, value in (("b", b), ("offs", offs)):
        check_same_device(value, name, a, "a")


def _fit_each_other(a: Tensor, b: Tensor, offs: Tensor) -> bool:
    """Of ordinary tensors: all that `check_grouped_mm` explains, asked at once. One by one its questions take
    the host as long as a launch."""
    a_shape, b_shape = a.shape, b.shape
    return (
        len(a_shape) == 2
        and len(b_shape) == 3
        and a_shape[1] == b_shape[1] != 0
        and b_shape[0] != 0
        and b_shape[2] != 0
        and offs.shape == b_shape[:1]
        and offs.dtype is torch.int32
        and a.dtype in FLOAT_DTYPES
        and b.dtype in FLOAT_DTYPES
        and a.device == b.device == offs.device
    )


def check_offs(offs: Tensor, num_experts: int) -> None:
    """`offs` must be int32 `(E,)`; what it holds cannot be checked without reading the device (`check_offs_values`)."""
    if offs.dtype != torch.int32:
        raise TypeError(f"offs has dtype {offs.dtype}; it must be torch.int32: pass offs.to(torch.int32)")
    if offs.shape != (num_experts,):
        raise ValueError(
            f"offs has shape {tuple(offs.shape)}; it must be ({num_experts},): the end row of each of b's groups"
        )


def check_topk(topk_ids: Any, num_experts: int) -> None:
    """`topk_ids` must be integers `(T, k)`; any value is valid, and one outside `0..E-1` means no expert."""
    check_tensors({"topk_ids": topk_ids})
    if topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex or topk_ids.dtype is torch.bool:
        raise TypeError(f"topk_ids has dtype {topk_ids.dtype}; it must be an integer dtype: pass expert numbers")
    if topk_ids.dim() != 2 or topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}; it must be (T, k) with at least one choice k")


def check_main_grad_of_b(main_grad: object, b: Tensor) -> None:
    """`main_grad` must be None, or what the gradient of a valid `b` can be added to, and what nobody else reduces."""
    if main_grad is None:
        return
    stored = "for a weight stored (E, N, K) it is passed as w.main_grad.transpose(-2, -1)"
    valid = _check_main_grad("main_grad", main_grad, b, hint=f"; {stored}")
    if not valid.is_contiguous() and not valid.transpose(1, 2).is_contiguous():
        raise ValueError(
            f"main_grad has strides {valid.stride()}; it must be contiguous or the transpose of a contiguous "
            "(E, N, K): keep it as torch.zeros_like(w, dtype=torch.float32) for a contiguous w, transposed as b is"
        )


def _check_main_grad(name: str, main_grad: object, weight: Tensor, hint: str = "") -> Tensor:
    """What must be true of any `main_grad`, but for its strides; the tensor. `hint` is of a wrong shape."""
    if not isinstance(main_grad, Tensor):
        raise TypeError(f"{name} is a {type(main_grad).__name__}; it must be a torch.Tensor or None")
    check_tensors({name: main_grad})
    if main_grad.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {main_grad.dtype}; it must be torch.float32: gradients are summed in it")
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"{name} has shape {tuple(main_grad.shape)}; it must be that of its weight, {tuple(weight.shape)}{hint}"
        )
    check_same_device(main_grad, name, weight, "its weight")
    if main_grad.requires_grad:
        raise ValueError(f"{name} requires a gradient itself; pass it detached")
    check_is_reduced_by_the_caller(name, weight)
    return main_grad


def check_weight_cache(weight_cache: object) -> None:
    """`weight_cache` must be None or a `WeightCache`; whether it is of the right weight shows when it is used."""
    if weight_cache is not None and not isinstance(weight_cache, WeightCache):
        raise TypeError(
            f"weight_cache is a {type(weight_cache).__name__}; it must be None or a fp8moe.WeightCache of the weight"
        )


def check_experts(
    a: Tensor, w_gate_up: object, w_down: Tensor, offs: Tensor, row_weights: Tensor | None,
    main_grads: object, weight_caches: object, projections: int,
) -> None:  # fmt: skip
    """Check the arguments of `swiglu_experts`; see there. `projections` is that of the gate."""
    rows = () if row_weights is None else (row_weights,)
    if _is_ordinary_layer(a, w_gate_up, w_down, projections, offs, *rows) and (
        offs.dtype is torch.int32
        and offs.shape == w_down.shape[:1]
        and (row_weights is None or (row_weights.shape == a.shape[:1] and row_weights.dtype in WEIGHT_DTYPES))
    ):
        _check_options(main_grads, weight_caches, w_gate_up, w_down)
        return
    check_tensors({"a": a, "offs": offs} | ({} if row_weights is None else {"row_weights": row_weights}))
    num_experts = _check_expert_weights(w_gate_up, w_down, a, "a", projections)
    check_offs(offs, num_experts)
    check_device(a, "a")
    check_same_device(offs, "offs", a, "a")
    if row_weights is not None:
        check_same_device(row_weights, "row_weights", a, "a")
        if row_weights.shape != a.shape[:1]:
            shapes = f"{tuple(row_weights.shape)} and a {tuple(a.shape)}"
            raise ValueError(f"row_weights has shape {shapes}; it must be one number for each row of a")
        check_float(row_weights, "row_weights", double=True)
    _check_options(main_grads, weight_caches, w_gate_up, w_down)


def check_moe(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: object, w_down: Tensor,
    main_grads: object, weight_caches: object, projections: int,
) -> None:  # fmt: skip
    """Check the arguments of `moe_forward`; see there. `projections` is that of the gate."""
    if _is_ordinary_layer(hidden, w_gate_up, w_down, projections, topk_ids, topk_weights) and (
        len(topk_ids.shape) == 2
        and topk_ids.shape[0] == hidden.shape[0]
        and topk_ids.shape[1] != 0
        and topk_ids.shape == topk_weights.shape
        and topk_ids.dtype in ID_DTYPES
        and topk_weights.dtype in WEIGHT_DTYPES
    ):
        _check_options(main_grads, weight_caches, w_gate_up, w_down)
        return
    check_tensors({"hidden": hidden, "topk_weights": topk_weights})
    num_experts = _check_expert_weights(w_gate_up, w_down, hidden, "hidden", projections)
    check_topk(topk_ids, num_experts)
    if topk_ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}; it must be ({hidden.shape[0]}, k)")
    if topk_weights.shape != topk_ids.shape:
        shapes = f"{tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)}"
        raise ValueError(f"topk_weights has shape {shapes}; they must be equal")
    check_float(topk_weights, "topk_weights", double=True)
    check_device(hidden, "hidden")
    for name, value in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        check_same_device(value, name, hidden, "hidden")
    _check_options(main_grads, weight_caches, w_gate_up, w_down)


ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _is_ordinary_layer(x: Tensor, w_gate_up: Any, w_down: Tensor, projections: int, *others: Tensor) -> bool:
    """Whether all are ordinary tensors on one device, and rows and weights are what `_check_expert_weights` explains,
    asked at once; a pair of weights is not."""
    if not are_ordinary(x, w_gate_up, w_down, *others):
        return False
    x_shape, down_shape, device = x.shape, w_down.shape, x.device
    if len(x_shape) != 2 or len(down_shape) != 3:
        return False
    num_experts, hidden_size, intermediate_size = down_shape
    return (
        x_shape[1] == hidden_size != 0
        and intermediate_size != 0
        and num_experts != 0
        and w_gate_up.shape == (num_experts, projections * intermediate_size, hidden_size)
        and x.dtype in FLOAT_DTYPES
        and w_gate_up.dtype in FLOAT_DTYPES
        and w_down.dtype in FLOAT_DTYPES
        and w_gate_up.device == w_down.device == device
        and all(other.device == device for other in others)
    )


def _are_default(options: object, default: object) -> bool:
    """Eager code asks, to save time; torch 2.11 cannot trace the question."""
    return not torch.compiler.is_compiling() and options is default


def check_activation(gate: object, biases: object, interleaved: object, w_gate_up: object, w_down: Tensor) -> None:
    """Check what `swiglu_experts` and `moe_forward` take for the activation; see there."""
    if not isinstance(gate, Gate):
        raise TypeError(f"gate is {gate!r}; it must be a fp8moe.Gate, such as Gate.swiglu()")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved is {interleaved!r}; it must be a bool")
    if not interleaved and not isinstance(w_gate_up, tuple) and _are_default(biases, NO_BIASES):
        return
    is_pair = isinstance(w_gate_up, tuple)
    if is_pair and not gate.has_gate:
        raise ValueError(f"w_gate_up is a pair, and {gate} has no gate: pass w_up alone, (E, I, H)")
    if interleaved and (is_pair or not gate.has_gate):
        what = "a pair" if is_pair else f"the up-projection alone ({gate} has no gate)"
        raise ValueError(f"interleaved is True, and w_gate_up is {what}; it must be one tensor of gate and up")
    if not isinstance(biases, tuple) or len(biases) != 2:
        raise TypeError(f"biases is {biases!r}; it must be a pair: for w_gate_up and for w_down, each may be None")
    check_tensors({"w_down": w_down} | {f"biases[{i}]": bias for i, bias in enumerate(biases) if bias is not None})
    if w_down.dim() != 3:
        return  # `_check_expert_weights` says so
    num_experts, hidden_size, intermediate_size = w_down.shape
    widths = (gate.projections * intermediate_size, hidden_size)
    for index, (bias, width) in enumerate(zip(biases, widths, strict=True)):
        if bias is None:
            continue
        check_float(bias, f"biases[{index}]")
        if bias.shape != (num_experts, width):
            raise ValueError(
                f"biases[{index}] has shape {tuple(bias.shape)}; beside w_down {tuple(w_down.shape)}, which is "
                f"(E, H, I), it must be {(num_experts, width)}"
            )
        check_same_device(bias, f"biases[{index}]", w_down, "w_down")


def _check_expert_weights(w_gate_up: object, w_down: Tensor, x: Tensor, x_name: str, projections: int) -> int:
    """The weights must fit each other and the rows of `x`; the number of experts."""
    parts: dict[str, Any]
    match w_gate_up:
        case Tensor():
            parts = {"w_gate_up": w_gate_up}
        case (w_gate, w_up):
            parts = {"w_gate_up[0] (the gate)": w_gate, "w_gate_up[1] (up)": w_up}
        case _:
            raise TypeError(
                f"w_gate_up is a {type(w_gate_up).__name__}; it must be a torch.Tensor (E, 2I, H), or the pair of "
                "torch.Tensors (w_gate, w_up), (E, I, H) each"
            )
    check_tensors({**parts, "w_down": w_down})
    if x.dim() != 2:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}; it must be 2D, (rows, H)")
    if w_down.dim() != 3 or w_down.shape[0] == 0:
        raise ValueError(f"w_down has shape {tuple(w_down.shape)}; it must be (E, H, I), E at least 1")
    num_experts, hidden_size, intermediate_size = w_down.shape
    width = projections * intermediate_size // len(parts)
    for name, part in parts.items():
        if part.shape != (num_experts, width, hidden_size):
            raise ValueError(
                f"{name} has shape {tuple(part.shape)}; beside w_down {tuple(w_down.shape)}, which is (E, H, I), it "
                f"must be {(num_experts, width, hidden_size)}"
            )
    if x.shape[1] != hidden_size:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}; its last dimension must be H, {hidden_size} in w_down")
    for name, size in (("H (w_down's second dimension)", hidden_size), ("I (w_down's last)", intermediate_size)):
        if size == 0:
            raise ValueError(f"{name} is 0; there must be at least one feature")
    for name, value in ((x_name, x), *parts.items(), ("w_down", w_down)):
        check_float(value, name)
        check_same_device(value, name, x, x_name)
    _check_gathered({**parts, "w_down": w_down})
    return num_experts


def _check_options(main_grads: object, weight_caches: object, w_gate_up: Any, w_down: Tensor) -> None:
    if _are_default(main_grads, NO_MAIN_GRADS) and _are_default(weight_caches, NO_CACHES):
        return
    for name, options in (("main_grads", main_grads), ("weight_caches", weight_caches)):
        if not isinstance(options, tuple) or len(options) != 2:
            raise TypeError(f"{name} is {options!r}; it must be a pair: for w_gate_up and for w_down, each may be None")
        if options[0] is not None and not isinstance(w_gate_up, Tensor):
            raise ValueError(f"{name}[0] is for one w_gate_up (E, 2I, H); with the pair (w_gate, w_up) it must be None")
        for index, (option, weight) in enumerate(zip(options, (w_gate_up, w_down), strict=True)):
            if name == "weight_caches":
                check_weight_cache(option)
                if option is not None and isinstance(weight, GatheredWeight):
                    raise ValueError(
                        f"{name}[{index}] is of a weight that is gathered in FP8, which needs none: leave it out"
                    )
            elif option is not None:
                main_grad = _check_main_grad(f"main_grads[{index}]", option, weight)
                if not main_grad.is_contiguous():
                    raise ValueError(f"main_grads[{index}] has strides {main_grad.stride()}; it must be contiguous")


def _check_gathered(weights: dict[str, Tensor]) -> None:
    """Weights that are gathered in FP8 must have the orientation in which they were quantized, and be a pair if they
    are used as one."""
    gathered = {name: weight for name, weight in weights.items() if isinstance(weight, GatheredWeight)}
    for name, weight in gathered.items():
        if not weight.is_oriented:
            raise ValueError(
                f"{name} is the transpose of what it is gathered as in FP8: pass stored_transposed to gather_in_fp8 as "
                "the weight is stored"
            )
    if len(weights) == 3:  # a pair, and w_down
        gate, up = [gathered.get(name) for name in weights if name != "w_down"]
        handles = [None if part is None else part.pair_handle for part in (gate, up)]
        if (gate is not None or up is not None) and (handles[0] is None or handles[0] is not handles[1]):
            raise ValueError(
                "w_gate_up is a pair that is not gathered in FP8 as one: pass gate_up=(name of the gate, name of up) "
                "to gather_in_fp8"
            )


def check_offs_values(offs: Tensor, num_rows: int, full: bool) -> None:
    """`FP8Config(debug=True)`: the ends must not decrease, and lie in 0..M; if `full`, the last must be M.

    Raises:
        ValueError: on a CPU. On CUDA a device-side assertion fails instead, so that nothing waits for the device;
            compiled code on a CPU raises the same message as a RuntimeError.
    """
    ends = torch.cat([offs.new_zeros(1), offs, offs.new_full((1,), num_rows)])
    valid = (ends.diff() >= 0).all()
    message = f"offs must not decrease and must lie in 0..{num_rows} (the rows of a)"
    if full:
        valid = valid & (offs[-1] == num_rows)
        message += f", and with FP8Config(assume_full=True) the last must be {num_rows}"
    if offs.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(valid, message)
    elif not valid:
        raise ValueError(f"{message}; it is {offs.tolist()}")
