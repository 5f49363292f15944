"""Each usable way of `fp8moe` to compute the layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage
from fp8moe.bench.guard import Limits
from fp8moe.bench.peers import LIGER, liger_op
from fp8moe.bench.variants import CacheOf, Explain, Variant, in_fp8, our_variant
from fp8moe.gemm.explain import Explanation

LIMITS = Limits(out=23.0, gradients=22.5)
"""Noisier than one product: what one makes is quantized for the next."""
COMPRESSED_LIMITS = Limits(out=23.0, gradients=21.5)
"""Of backward from activations kept in FP8."""

LIGER_VARIANT = Variant(LIGER, liger_op, "bf16", lambda out: "Triton", is_ours=False, limits=LIMITS)

Options = Callable[[Any, Any], dict[str, Any]]
"""The options of `fp8moe.moe_forward` for these `w_gate_up` and `w_down`."""


def layer_variants(explain: Explain) -> list[Variant]:
    """`fp8moe.moe_forward` with the configuration explained.

    Where that is FP8 also with cached weights, with the weights' gradients added to their `main_grad`, with both, and
    with the activations kept in FP8.
    """
    cache_of = CacheOf(), CacheOf()  # for all variants: they are of the same weights

    def cached(w_gate_up: Any, w_down: Any) -> dict[str, Any]:
        return {"weight_caches": (cache_of[0](w_gate_up), cache_of[1](w_down))}

    def main_grads(w_gate_up: Any, w_down: Any) -> dict[str, Any]:
        return {"main_grads": (w_gate_up.main_grad, w_down.main_grad)}

    def both(w_gate_up: Any, w_down: Any) -> dict[str, Any]:
        return cached(w_gate_up, w_down) | main_grads(w_gate_up, w_down)

    plain, with_caches = explain(), explain(weight_cache=True)
    compressed = replace(plain, config=replace(plain.config, activation_storage=ActivationStorage.FP8))
    return [
        _layer_variant(plain, "", lambda w_gate_up, w_down: {}),
        *in_fp8(
            _layer_variant(with_caches, " cached", cached),
            _layer_variant(plain, " main_grads", main_grads),
            _layer_variant(with_caches, " cached main_grads", both),
            _layer_variant(compressed, " FP8 storage", lambda w_gate_up, w_down: {}, COMPRESSED_LIMITS),
        ),
    ]


def _layer_variant(explanation: Explanation, suffix: str, options: Options, limits: Limits = LIMITS) -> Variant:
    def op(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        return fp8moe.moe_forward(
            hidden, topk_ids, topk_weights, w_gate_up, w_down, config=explanation.config, **options(w_gate_up, w_down)
        )

    return our_variant(explanation, suffix, op, limits)
