"""Another project's grouped product and MoE layer, measured beside ours where they are installed."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8moe.bench.variants import Variant
from fp8moe.operands import BLOCK

TORCHAO, LIGER = "torchao", "liger_kernel"
_TORCHAO_MODULE = "torchao.prototype.moe_training.blockwise_fp8.grouped_mm"
_LIGER_MODULE = "liger_kernel.ops.fused_moe"


def is_installed(package: str) -> bool:
    """Whether there is such a package at all; whether it has the op shows when it is called."""
    return importlib.util.find_spec(package) is not None


def torchao_variant(group_sizes: Sequence[int]) -> Variant:
    """torchao's op (0.18) at its best: without its padding where all groups are multiples of 128 rows."""
    aligned = all(size % BLOCK == 0 for size in group_sizes)

    def op(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        out: Tensor = importlib.import_module(_TORCHAO_MODULE)._to_fp8_blockwise_then_scaled_grouped_mm(
            a,
            w.transpose(-2, -1),
            offs,
            out_dtype=torch.bfloat16,  # the only one its fast backend takes
            pad_token_groups_for_grouped_mm=not aligned,
        )
        return out

    return Variant("torchao FP8", op, _torchao_backend, is_ours=False)


def liger_variant(group_sizes: Sequence[int]) -> Variant:
    """Liger's fused MoE layer (0.8): BF16, every expert's products in Triton, gathering and SwiGLU fused into them."""

    def op(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        function = importlib.import_module(_LIGER_MODULE).LigerFusedMoEFunction
        out: Tensor = function.apply(hidden, w_gate_up, w_down, topk_ids.int(), topk_weights)
        return out

    return Variant("Liger BF16", op, lambda out: "Triton", is_ours=False)


def _torchao_backend(out: Tensor) -> str:
    """What computed `out`: torchao emulates without a word where it cannot use DeepGEMM."""
    node: Any = out.grad_fn
    return str(node.backend.kind.value) if hasattr(node, "backend") else "unknown"
