"""One MoE layer, `fp8moe.moe_forward`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage
from fp8moe.bench.floor import layer_step
from fp8moe.bench.layer.baseline import bf16_layer
from fp8moe.bench.layer.kernels import kernels
from fp8moe.bench.peers import LIGER, liger_variant
from fp8moe.bench.problem import Problem, random_normal
from fp8moe.bench.shapes import Balance, Shape, draw_topk, layer_shape
from fp8moe.bench.task import Task
from fp8moe.bench.variants import Option
from fp8moe.gemm.cost import OpSize

MIN_SQNR_DB, MIN_COMPRESSED_SQNR_DB = 22.5, 21.5
"""Noisier than one product: what one makes is quantized for the next. And of activations kept in FP8."""
COMPARED_FROM = {"d_topk_weights": 0, "d_w_gate_up": 1, "d_w_down": 1}
"""By expert, and the gradient of the router's weights as a whole: a row of an expert's weight gradient sums over its
tokens, and a token has few weights. Of a few numbers that happen to be small, the noise of correct FP8 may be as
large."""


def draw(shape: Shape, balance: Balance, device: torch.device, seed: int) -> Problem:
    """Of the arguments of `fp8moe.moe_forward` to `(T, H)`: standard normal tokens and gradients, weights that keep
    what they make of that size, a random router."""
    normal = random_normal(device, seed)
    topk_ids, topk_weights = draw_topk(shape, balance, seed)
    t, _, h, i, e = shape.sizes
    arguments = {
        "hidden": normal(t, h).requires_grad_(),
        "topk_ids": topk_ids.to(device),
        "topk_weights": topk_weights.to(device).requires_grad_(),
        "w_gate_up": normal(e, 2 * i, h).mul_(h**-0.5).requires_grad_(),
        "w_down": normal(e, h, i).mul_(i**-0.5).requires_grad_(),
    }
    return Problem(arguments, normal(t, h), torch.bincount(topk_ids.flatten(), minlength=e).tolist(), COMPARED_FROM)


def _run(*arguments: Tensor, **options: Any) -> Tensor:
    return fp8moe.moe_forward(*arguments, **options)


_option = partial(Option, min_sqnr_db=MIN_SQNR_DB)

LAYER = Task(
    name="layer",
    title="MoE layer",
    explained_as="layer",
    shape=layer_shape,
    shapes_on_cuda=(
        layer_shape(8192, 4, 7168, 2048, 8, "like DeepSeek-V3"),
        layer_shape(8192, 8, 2048, 768, 16, "Qwen3-30B-A3B, an expert-parallel share"),
        layer_shape(8192, 8, 2048, 768, 128, "Qwen3-30B-A3B, all experts"),
    ),
    shapes_on_cpu=(
        layer_shape(512, 2, 256, 128, 4, "tiny"),
        layer_shape(512, 4, 128, 128, 8, "tiny fine-grained"),
    ),
    balances=(Balance.UNIFORM, Balance.SKEWED),
    problem=draw,
    baseline=bf16_layer,
    peer_package=LIGER,
    peer=liger_variant,
    run=_run,
    options=(
        _option(""),
        _option("cached", cached=True),
        _option("main_grad", main_grad=True),
        _option("cached main_grad", cached=True, main_grad=True),
        _option("weights kept", kept=True),
        Option("FP8 storage", storage=ActivationStorage.FP8, min_sqnr_db=MIN_COMPRESSED_SQNR_DB),
    ),
    kernels=kernels,
    step=layer_step,
    op_size=lambda shape: OpSize.of_layer(shape["T"] * shape["k"], shape["H"], shape["I"], shape["E"]),
)
