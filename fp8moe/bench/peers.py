"""Other projects' grouped products and MoE layers, measured beside ours where they are installed."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp8moe.bench.problem import Op

TORCHAO = "torchao FP8"
TORCHAO_ABSENT = "torchao is not installed, so its FP8 blockwise op has no row here: pip install torchao"
_TORCHAO_MODULE = "torchao.prototype.moe_training.blockwise_fp8.grouped_mm"
_TORCHAO_FUNCTION = "_to_fp8_blockwise_then_scaled_grouped_mm"

LIGER = "Liger BF16"
LIGER_ABSENT = "liger-kernel is not installed, so its fused MoE layer has no row here: pip install liger-kernel"
_LIGER_MODULE = "liger_kernel.ops.fused_moe"
_LIGER_FUNCTION = "LigerFusedMoEFunction"


def torchao_is_installed() -> bool:
    """Whether there is a torchao at all; whether it has the op shows when it is called."""
    return importlib.util.find_spec("torchao") is not None


def torchao_op(aligned: bool) -> Op:
    """torchao's op (0.18) at its best: without its padding where all groups are multiples of 128."""

    def op(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        out: Tensor = _torchao_function()(
            a,
            w.transpose(-2, -1),
            offs,
            out_dtype=torch.bfloat16,  # the only one its fast backend takes
            pad_token_groups_for_grouped_mm=not aligned,
        )
        return out.to(a.dtype)

    return op


def torchao_backend(out: Tensor) -> str:
    """What computed `out`: torchao emulates without a word where it cannot use DeepGEMM."""
    node: Any = out.grad_fn
    nodes = [node, *(before for before, _ in node.next_functions)]  # the op's, or a conversion's after it
    return next((str(node.backend.kind.value) for node in nodes if hasattr(node, "backend")), "unknown")


def liger_is_installed() -> bool:
    """Whether there is a liger-kernel at all; whether it has the layer shows when it is called."""
    return importlib.util.find_spec("liger_kernel") is not None


def liger_op(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Liger's fused MoE layer (0.8): BF16, every expert's products in Triton, gathering and SwiGLU fused into them."""
    function = getattr(importlib.import_module(_LIGER_MODULE), _LIGER_FUNCTION)
    out: Tensor = function.apply(hidden, w_gate_up, w_down, topk_ids.int(), topk_weights)
    return out


@cache
def _torchao_function() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(importlib.import_module(_TORCHAO_MODULE), _TORCHAO_FUNCTION)
    return function
