"""The experts of a layer in INT8 or INT4: made from weights or from a module, and everything after the router."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8moe.checks import check_device, check_float, check_same_device, check_tensors
from fp8moe.config import FP8Config
from fp8moe.gate import SWIGLU
from fp8moe.int8.checks import Rounding, check_no_gradient
from fp8moe.int8.grouped_mm import check_units, int8_grouped_mm
from fp8moe.int8.groups import plan_choices
from fp8moe.int8.reference import INT8_LEVELS
from fp8moe.int8.rows import int8_quantize_rows
from fp8moe.int8.weights import QuantizedWeight, quantize_weight
from fp8moe.integrations.handwritten import HandWritten, recognize
from fp8moe.modules import SwiGLUExperts
from fp8moe.rows.combine import combine
from fp8moe.rows.routing import route_choices

MOST_OF_TOKENS, MOST_OF_ACTIVATIONS = 128, 32
"""Features that share a scale, if users do not say. What SwiGLU makes has longer tails than tokens have."""
SHORTEST_TILE = 32
ID_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """The weights of SwiGLU experts, quantized."""

    gate_up: QuantizedWeight
    """`(E, 2I, H)`, the gate's rows before the up-projection's."""
    down: QuantizedWeight
    """`(E, H, I)`."""
    activation_tiles: tuple[int | None, int | None]
    """Features of a row that share a scale: of the tokens, and of what is between the products. None: all."""
    inv_smooth: Tensor | None = None
    """fp32 `(E, H)`: what to multiply the features of an expert's rows by; None: nothing."""

    @property
    def tiled(self) -> bool:
        """Whether rows have several scales, before either product."""
        widths = self.gate_up.data.shape[2], self.down.data.shape[2]
        return any(tile is not None and tile < k for tile, k in zip(self.activation_tiles, widths, strict=True))

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        tensors = [self.gate_up.data, self.gate_up.scale, self.down.data, self.down.scale]
        return sum(tensor.nbytes for tensor in (*tensors, *([] if self.inv_smooth is None else [self.inv_smooth])))


def quantize_experts(
    w_gate_up: Tensor,
    w_down: Tensor,
    weight_bits: int = 8,
    group_size: int | None = 128,
    smooth: Tensor | None = None,
    *,
    activation_tiles: tuple[int | None, int | None] | None = None,
    rounding: Rounding = Rounding.HALF_TO_EVEN,
) -> QuantizedExperts:
    """Quantize the weights of SwiGLU experts with group scales.

    Args:
        w_gate_up: bf16, fp16 or fp32 `(E, 2I, H)`, any strides, the gate's rows first.
        w_down: `(E, H, I)`.
        weight_bits: 8 or 4.
        group_size: elements of the contracted dimension that share a scale; None: all.
        smooth: positive float `(E, H)`, the scales of SmoothQuant: the columns of `w_gate_up` are multiplied by them
            before they are quantized, and the rows of `hidden` divided.
        activation_tiles: features of a row that share a scale when the layer quantizes it, of the tokens and of what is
            between the products, each a divisor or a multiple of `group_size`. `(None, None)`, one scale a row, is
            fastest. None: at most 128 and 32, which leave an error of 1.4% on random data (a scale a row: 2.4%).
        rounding: of what lies in the middle between two codes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device.
    """
    check_tensors({"w_gate_up": w_gate_up, "w_down": w_down})
    if w_down.dim() != 3 or w_gate_up.shape != (w_down.shape[0], 2 * w_down.shape[2], w_down.shape[1]):
        raise ValueError(
            f"w_gate_up has shape {tuple(w_gate_up.shape)} and w_down {tuple(w_down.shape)}; they must be (E, 2I, H) "
            "and (E, H, I)"
        )
    check_same_device(w_down, "w_down", w_gate_up, "w_gate_up")
    if weight_bits == 4 and (w_down.shape[1] % 2 or w_down.shape[2] % 2):
        raise ValueError(f"w_down has shape {tuple(w_down.shape)}; H and I must be even for 4 bits: rows share bytes")
    inv_smooth = None
    if smooth is not None:
        check_tensors({"smooth": smooth})
        check_float(smooth, "smooth")
        check_same_device(smooth, "smooth", w_gate_up, "w_gate_up")
        inv_smooth = smooth.detach().float().reciprocal()
    gate_up = quantize_weight(w_gate_up.detach(), weight_bits, group_size, smooth=smooth, rounding=rounding)
    down = quantize_weight(w_down.detach(), weight_bits, group_size, rounding=rounding)
    if activation_tiles is None:
        activation_tiles = (
            _tile_within(gate_up.group_size, MOST_OF_TOKENS), _tile_within(down.group_size, MOST_OF_ACTIVATIONS)
        )  # fmt: skip
    for tile, weight in zip(activation_tiles, (gate_up, down), strict=True):
        check_units(weight.data.shape[2], weight.group_size, tile, "activation_tiles")
    return QuantizedExperts(gate_up, down, activation_tiles, inv_smooth)


def quantize_module(
    module: nn.Module,
    weight_bits: int = 8,
    group_size: int | None = 128,
    smooth: Tensor | None = None,
    *,
    activation_tiles: tuple[int | None, int | None] | None = None,
    rounding: Rounding = Rounding.HALF_TO_EVEN,
) -> QuantizedExperts:
    """`quantize_experts` of the weights of a trained module.

    Args:
        module: a `fp8moe.SwiGLUExperts`, an experts module of Hugging Face transformers, or a hand-written one that
            `fp8moe.convert` takes. Its experts must be plain SwiGLU, without biases.
        weight_bits, group_size, smooth, activation_tiles, rounding: as in `quantize_experts`.

    Raises:
        TypeError: `module` is no module.
        ValueError: the experts cannot be quantized; the message says why.
    """
    w_gate_up, w_down = _weights_of(module)
    return quantize_experts(
        w_gate_up, w_down, weight_bits, group_size, smooth, activation_tiles=activation_tiles, rounding=rounding
    )


def int8_moe_forward(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: QuantizedExperts) -> Tensor:
    """Everything between the router and the layer's output, in INT8 x INT8 or INT8 x INT4; `fp8moe.moe_forward` without
    gradients.

    Each token is quantized once, or with smoothing each row; the products gather the codes. What is between the
    products is stored in the dtype of `hidden`. The groups are planned once, and nothing is read on the host.

    Args:
        hidden: bf16, fp16 or fp32 `(T, H)`.
        topk_ids: integers `(T, k)`. An id outside `0..E-1` adds nothing (dropped).
        topk_weights: float `(T, k)`.
        experts: as `quantize_experts` makes them.

    Returns:
        `(T, H)`, in the dtype of `hidden`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or requires a gradient.
    """
    check_tensors({"hidden": hidden, "topk_ids": topk_ids, "topk_weights": topk_weights})
    if not isinstance(experts, QuantizedExperts):
        raise TypeError(f"experts is a {type(experts).__name__}; make it with fp8moe.int8.quantize_experts")
    num_experts, _, hidden_size = experts.gate_up.data.shape
    if hidden.dim() != 2 or hidden.shape[1] != hidden_size:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; it must be (T, {hidden_size}), as the experts have it"
        )
    check_float(hidden, "hidden")
    check_device(hidden, "hidden")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != hidden.shape[0] or topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}; it must be ({hidden.shape[0]}, k), k at least 1")
    if topk_ids.dtype not in ID_DTYPES:
        raise TypeError(f"topk_ids has dtype {topk_ids.dtype}; it must be one of {', '.join(map(str, ID_DTYPES))}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights has shape {tuple(topk_weights.shape)}; it must be {tuple(topk_ids.shape)}")
    check_float(topk_weights, "topk_weights", double=True)
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights), ("experts", experts.down.data)):
        check_same_device(tensor, name, hidden, "hidden")
    check_no_gradient(hidden=hidden, topk_weights=topk_weights)

    ends, choice_row = route_choices(topk_ids, num_experts)
    tiles, row_token, row_weights = plan_choices(ends, choice_row, topk_weights, experts.gate_up.bits, experts.tiled)
    tile, act_tile = experts.activation_tiles
    if experts.inv_smooth is None:
        codes, scale = int8_quantize_rows(hidden, tile or hidden_size, INT8_LEVELS, False)
        row_source: Tensor | None = row_token
    else:
        codes, scale = int8_quantize_rows(
            hidden, tile or hidden_size, INT8_LEVELS, False, experts.inv_smooth, ends, row_token
        )
        row_source = None
    act = int8_grouped_mm(
        codes, scale, experts.gate_up.data, experts.gate_up.scale, ends, experts.gate_up.group_size, "swiglu",
        a_tile=tile, row_source=row_source, out_dtype=hidden.dtype, tiles=tiles,
    )  # fmt: skip
    codes, scale = int8_quantize_rows(act, act_tile or act.shape[1], INT8_LEVELS, False)
    rows = int8_grouped_mm(
        codes, scale, experts.down.data, experts.down.scale, ends, experts.down.group_size,
        a_tile=act_tile, row_weights=row_weights, out_dtype=hidden.dtype, tiles=tiles,
    )  # fmt: skip
    return combine(rows, choice_row, hidden.dtype)


class Int8Experts(nn.Module):
    """Quantized experts as a module without parameters: `forward(hidden, topk_ids, topk_weights)`.

    Codes and scales are buffers, so they move with the model and are in its `state_dict`.

    Args:
        experts: as `quantize_experts` or `quantize_module` makes them.
    """

    def __init__(self, experts: QuantizedExperts) -> None:
        super().__init__()
        if not isinstance(experts, QuantizedExperts):
            raise TypeError(f"experts is a {type(experts).__name__}; make it with fp8moe.int8.quantize_experts")
        self.group_sizes = experts.gate_up.group_size, experts.down.group_size
        self.activation_tiles = experts.activation_tiles
        self.register_buffer("gate_up", experts.gate_up.data)
        self.register_buffer("gate_up_scale", experts.gate_up.scale)
        self.register_buffer("down", experts.down.data)
        self.register_buffer("down_scale", experts.down.scale)
        self.register_buffer("inv_smooth", experts.inv_smooth)

    @property
    def experts(self) -> QuantizedExperts:
        """What the buffers hold now."""
        gate_up, down = (
            QuantizedWeight(getattr(self, name), getattr(self, f"{name}_scale"), group_size)
            for name, group_size in zip(("gate_up", "down"), self.group_sizes, strict=True)
        )
        inv_smooth = None if self.inv_smooth is None else self.get_buffer("inv_smooth")
        return QuantizedExperts(gate_up, down, self.activation_tiles, inv_smooth)

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As `int8_moe_forward`."""
        return int8_moe_forward(hidden, topk_ids, topk_weights, self.experts)


def _tile_within(group_size: int, most: int) -> int:
    """A tile of at most so many features that goes with groups of this size, if there is one that is not too short."""
    if group_size <= most:
        return group_size
    common = math.gcd(group_size, most)
    return common if common >= SHORTEST_TILE else group_size


def _weights_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """`(E, 2I, H)` and `(E, H, I)`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; it must be a torch.nn.Module")
    if isinstance(module, SwiGLUExperts):
        return module.w_gate_up, module.w_down
    if "transformers" in sys.modules and hasattr(type(module), "_apply_gate"):
        return _weights_of_transformers(module)
    way = recognize(module, FP8Config())
    if not isinstance(way, HandWritten):
        raise ValueError(f"module is a {type(module).__name__}, whose weights fp8moe does not know, because {way}")
    w_gate_up, w_down = way.layout.weights(module)
    return w_gate_up if isinstance(w_gate_up, Tensor) else torch.cat(w_gate_up, dim=1), w_down


def _weights_of_transformers(module: Any) -> tuple[Tensor, Tensor]:
    """Of an experts module that transformers dispatches."""
    from fp8moe.integrations import transformers as hf
    from fp8moe.integrations.transformers.gates import GateForm, gate_of

    kind, reason = type(module).__name__, hf.why_not(module)
    if reason is not None:
        raise ValueError(f"module is a {kind}, which fp8moe cannot compute: {reason}")
    form = gate_of(module)
    if not isinstance(form, GateForm) or form.computed_as != SWIGLU or form.interleaved or module.has_bias:
        biased = ", with biases" if module.has_bias else ""
        raise ValueError(f"module is a {kind}, with the gate {form}{biased}; fp8moe.int8 has silu(gate) * up alone")
    gate_up, down = module.gate_up_proj, module.down_proj
    return (gate_up.transpose(1, 2), down.transpose(1, 2)) if module.is_transposed else (gate_up, down)
