"""A routed layer in BF16 in its plain case: the products and launches, and nothing between them.

Such a layer is mostly host time. What the operators in `autograd/experts_in_bf16.py` ask and convert one by one is
asked here once (`is_plain`), so this takes half of their time, for the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.gemm.bf16 import ROW_ALIGNMENT
from fp8moe.kernels.combine import launch_combine
from fp8moe.kernels.gated_in_bf16 import launch_gated, launch_gated_backward
from fp8moe.kernels.spread import launch_spread


def is_plain(hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor) -> bool:
    """Whether PyTorch's `grouped_mm` takes all as it is, and computes every gradient, without a copy.

    Args:
        hidden, w_gate_up, w_down: `(T, H)`, `(E, 2I, H)` and `(E, H, I)`, without a gate `(E, I, H)` and `(E, H, I)`.
        weights: `(T, k)`.
    """
    _, hidden_size, intermediate_size = w_down.shape
    width = w_gate_up.shape[1]
    return (
        hidden.dtype is w_gate_up.dtype is w_down.dtype is torch.bfloat16
        and hidden.shape[0] != 0
        and hidden_size % ROW_ALIGNMENT == intermediate_size % ROW_ALIGNMENT == 0
        and hidden.is_contiguous()
        and weights.is_contiguous()
        and (w_gate_up.is_contiguous() or w_gate_up.stride() == (hidden_size * width, 1, width))
        and (w_down.is_contiguous() or w_down.stride() == (hidden_size * intermediate_size, 1, hidden_size))
        and (w_gate_up.data_ptr() | w_down.data_ptr()) % 16 == 0
        and not torch.is_autocast_enabled(hidden.device.type)  # which might convert them
    )


def layer_forward(
    hidden: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, choice_row: Tensor, ends: Tensor,
    gate: str, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From tokens to tokens.

    Args:
        hidden, w_gate_up, w_down, weights: that are plain.
        choice_row, ends: of the `Routing` of these tokens.
        gate, interleaved: as in `gated_in_bf16`.

    Returns:
        The output `(T, H)`, and what backward needs: the rows `(M, H)`, their gate and up `(M, 2I)`, and activation
        `(M, I)`.
    """
    num_rows = choice_row.numel()
    rows = hidden.new_empty((num_rows, hidden.shape[1]))
    launch_spread(hidden, choice_row, rows)
    gate_up = F.grouped_mm(rows, w_gate_up.transpose(1, 2), offs=ends)
    act = hidden.new_empty((num_rows, w_down.shape[2]))
    launch_gated((gate_up,), weights, choice_row, act, gate, interleaved)
    out = torch.empty_like(hidden)
    launch_combine(F.grouped_mm(act, w_down.transpose(1, 2), offs=ends), choice_row, out)
    return out, rows, gate_up, act


def layer_backward(
    dout: Tensor, rows: Tensor | None, w_gate_up: Tensor | None, w_down: Tensor | None, weights: Tensor,
    gate_up: Tensor | None, act: Tensor | None, choice_row: Tensor, ends: Tensor, gate: str, interleaved: bool,
    gate_up_is_transposed: bool, down_is_transposed: bool, wants_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """From the gradient of the output `(T, H)` to those of `hidden`, `w_gate_up`, `w_down` and `weights`.

    Args:
        dout: bf16, any strides.
        rows, w_gate_up, act: of `layer_forward`, or None: then the gradients of `w_gate_up`, `hidden` and `w_down` are.
        w_down, gate_up: None if `w_down` alone gets a gradient.
        weights, choice_row, ends, gate, interleaved: of `layer_forward`.
        gate_up_is_transposed, down_is_transposed: whether a weight is stored `(E, K, N)`: then its gradient is.
        wants_weights: whether to return the gradient of `weights`, in fp32.
    """
    dout = dout.contiguous()
    d_out = dout.new_empty((choice_row.numel(), dout.shape[1]))
    launch_spread(dout, choice_row, d_out)
    d_hidden = d_w_gate_up = d_w_down = d_weights = None
    if act is not None:
        d_w_down = _wgrad(d_out, act, ends, down_is_transposed)
    if w_down is None or gate_up is None:
        return None, None, d_w_down, None
    d_gate_up = torch.empty_like(gate_up)
    if wants_weights:
        d_weights = torch.empty_like(weights, dtype=torch.float32)
    d_act = F.grouped_mm(d_out, w_down, offs=ends)
    launch_gated_backward(d_act, (gate_up,), weights, choice_row, (d_gate_up,), d_weights, gate, interleaved)
    if rows is not None:
        d_w_gate_up = _wgrad(d_gate_up, rows, ends, gate_up_is_transposed)
    if w_gate_up is not None:
        d_hidden = torch.empty_like(dout)
        launch_combine(F.grouped_mm(d_gate_up, w_gate_up, offs=ends), choice_row, d_hidden)
    return d_hidden, d_w_gate_up, d_w_down, d_weights


def _wgrad(d_out: Tensor, x: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """`(E, N, K)`, as the weight is stored."""
    if transposed:
        return F.grouped_mm(x.t(), d_out, offs=ends).transpose(1, 2)
    return F.grouped_mm(d_out.t(), x, offs=ends)
