"""One MoE layer, `fp8moe.moe_forward`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage
from fp8moe.bench.floor import layer_step
from fp8moe.bench.layer.baseline import bf16_layers, eager_layer, fused_layer
from fp8moe.bench.layer.experts import PLAIN, experts_of
from fp8moe.bench.layer.kernels import kernels
from fp8moe.bench.peers import LIGER, liger_variant
from fp8moe.bench.problem import Problem, random_normal
from fp8moe.bench.shapes import Balance, Shape, draw_topk, layer_shape
from fp8moe.bench.task import Task
from fp8moe.bench.variants import Option, Run, Variant
from fp8moe.gemm.cost import OpSize

MIN_SQNR_DB, MIN_COMPRESSED_SQNR_DB = 22.5, 21.5
"""Noisier than one product: what one makes is quantized for the next. And of activations kept in FP8."""
BIAS_SIZE = 0.1
"""Standard deviation of biases."""
COMPARED_FROM = {"d_topk_weights": 0, "d_w_gate_up": 1, "d_w_down": 1}
"""By expert, and the gradient of the router's weights as a whole: a row of an expert's weight gradient sums over its
tokens, and a token has few weights. Of a few numbers that happen to be small, the noise of correct FP8 may be as
large."""


def draw(shape: Shape, balance: Balance, device: torch.device, seed: int) -> Problem:
    """Of the arguments of `fp8moe.moe_forward` to `(T, H)`: standard normal tokens and gradients, weights that keep
    what they make of that size, a random router; then the biases, where the experts have some."""
    normal, experts = random_normal(device, seed), experts_of(shape.name)
    topk_ids, topk_weights = draw_topk(shape, balance, seed)
    t, _, h, i, e = shape.sizes

    def weight(n: int, k: int) -> Tensor:
        stored = normal(e, k, n).transpose(1, 2).clone() if experts.transposed else normal(e, n, k)  # keeps its strides
        return stored.mul_(k**-0.5).requires_grad_()

    arguments = {
        "hidden": normal(t, h).requires_grad_(),
        "topk_ids": topk_ids.to(device),
        "topk_weights": topk_weights.to(device).requires_grad_(),
        "w_gate_up": weight(2 * i, h),
        "w_down": weight(h, i),
    }
    if experts.biases:
        biases = {"b_gate_up": normal(e, 2 * i), "b_down": normal(e, h)}
        arguments |= {name: bias.mul_(BIAS_SIZE).requires_grad_() for name, bias in biases.items()}
    return Problem(arguments, normal(t, h), torch.bincount(topk_ids.flatten(), minlength=e).tolist(), COMPARED_FROM)


def _run(shape: Shape) -> Run:
    experts = experts_of(shape.name)

    def run(
        hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *biases: Tensor, **options: Any
    ) -> Tensor:
        if experts != PLAIN:
            options |= {"gate": experts.gate, "interleaved": experts.interleaved, "biases": biases or (None, None)}
        return fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, **options)

    return run


_option = partial(Option, min_sqnr_db=MIN_SQNR_DB)
OPTIONS = (
    _option(""),
    _option("cached", cached=True),
    _option("main_grad", main_grad=True),
    _option("cached main_grad", cached=True, main_grad=True),
    _option("weights kept", kept=True),
    Option("FP8 storage", storage=ActivationStorage.FP8, min_sqnr_db=MIN_COMPRESSED_SQNR_DB),
)


def _with_main_grads(shape: Shape) -> bool:
    return not experts_of(shape.name).transposed


def _baselines(shape: Shape, device: torch.device) -> list[Variant]:
    found = bf16_layers(experts_of(shape.name), device)
    return [variant for variant in found if _with_main_grads(shape) or not variant.main_grad]


LAYER = Task(
    name="layer",
    title="MoE layer",
    explained_as="layer",
    shape=layer_shape,
    shapes_on_cuda=(
        layer_shape(8192, 4, 7168, 2048, 8, "like DeepSeek-V3"),
        layer_shape(8192, 8, 2048, 768, 16, "Qwen3-30B-A3B, an expert-parallel share"),
        layer_shape(8192, 8, 2048, 768, 128, "Qwen3-30B-A3B, all experts"),
        layer_shape(8192, 2, 4096, 14336, 8, "Mixtral-8x7B"),
        layer_shape(8192, 6, 2048, 1408, 64, "DeepSeek-V2-Lite"),
        layer_shape(8192, 4, 2880, 2880, 32, "gpt-oss-20b: clamped SwiGLU, biases"),
        layer_shape(4096, 8, 7168, 2048, 32, "Megatron's H100 baseline, like DeepSeek-V3"),
        layer_shape(4096, 2, 4096, 14336, 8, "Megatron's H100 baseline, Mixtral-8x7B"),
    ),
    shapes_on_cpu=(
        layer_shape(512, 2, 256, 128, 4, "tiny"),
        layer_shape(512, 4, 128, 128, 8, "tiny fine-grained"),
        layer_shape(256, 4, 120, 200, 8, "gpt-oss, tiny"),
    ),
    balances=(Balance.UNIFORM, Balance.SKEWED),
    problem=draw,
    reference=lambda shape: fused_layer(experts_of(shape.name)),
    eager=lambda shape: eager_layer(experts_of(shape.name)),
    baselines=_baselines,
    peer_package=LIGER,
    peer=lambda shape, group_sizes: liger_variant(group_sizes) if experts_of(shape.name) == PLAIN else None,
    run=_run,
    options=lambda shape: [option for option in OPTIONS if _with_main_grads(shape) or not option.main_grad],
    kernels=kernels,
    step=layer_step,
    op_size=lambda shape: OpSize.of_layer(shape["T"] * shape["k"], shape["H"], shape["I"], shape["E"]),
)
