"""One layer of experts in each way that is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

import fp8moe
from fp8moe.bench.int8.kernels import other_ways
from fp8moe.bench.layer.baseline import fused_layer
from fp8moe.bench.layer.experts import PLAIN
from fp8moe.bench.problem import random_normal
from fp8moe.bench.shapes import Balance, Shape, draw_topk
from fp8moe.int8 import (
    QuantizedExperts,
    RowTiles,
    int8_grouped_mm,
    int8_moe_forward,
    quantize_experts,
    quantize_rows_int8,
)
from fp8moe.int8.groups import plan_choices
from fp8moe.rows.combine import combine
from fp8moe.rows.routing import route_choices

SEED = 0
Compile = Callable[[Callable[..., object]], Callable[..., object]]
Layer = Callable[[], Tensor]
"""A way to compute a layer, or a product, of given tokens."""


@dataclass(frozen=True)
class LayerProblem:
    """A layer's weights, and tokens with what a router said of them; random, a function of the shape alone."""

    shape: Shape
    device: torch.device

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """bf16 `(E, 2I, H)` and `(E, H, I)`, scaled by fan-in."""
        _, _, h, i, e = self.shape.sizes
        normal = random_normal(self.device, SEED)
        return normal(e, 2 * i, h) * h**-0.5, normal(e, h, i) * i**-0.5

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """`hidden`, `topk_ids`, `topk_weights`."""
        hidden = random_normal(self.device, SEED + 1)(self.shape["T"], self.shape["H"])
        topk_ids, topk_weights = draw_topk(self.shape, Balance.UNIFORM, SEED)
        return hidden, topk_ids.to(self.device), topk_weights.to(self.device)

    def with_tokens(self, num_tokens: int) -> "LayerProblem":
        """The same weights, made once, and so many tokens."""
        _, k, h, i, e = self.shape.sizes
        other = LayerProblem(Shape("TkHIE", (num_tokens, k, h, i, e), self.shape.name), self.device)
        other.__dict__["weights"] = self.weights
        return other

    def quantized(self, bits: int, tiles: tuple[int | None, int | None] | None = None) -> QuantizedExperts:
        """Its experts, in groups of 128."""
        return quantize_experts(*self.weights, bits, other_ways.GROUP, activation_tiles=tiles)

    def ours(self, experts: QuantizedExperts) -> Layer:
        """`int8_moe_forward`."""
        return lambda: int8_moe_forward(*self.tokens, experts)

    def with_these(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> "LayerProblem":
        """The same sizes, and these tokens."""
        other = LayerProblem(self.shape, self.device)
        other.__dict__["tokens"] = (hidden, topk_ids, topk_weights)
        return other

    def bf16_experts(self, compile_: Compile) -> Callable[..., Tensor]:
        """PyTorch's `grouped_mm`, with what is no product compiled by `compile_`; of tokens, choices and weights."""
        return fused_layer(PLAIN, compile_)

    def bf16(self, compile_: Compile) -> Layer:
        """`bf16_experts` of these tokens."""
        layer = self.bf16_experts(compile_)
        return lambda: layer(*self.tokens, *self.weights)

    def fp8(self) -> Layer:
        """`fp8moe.moe_forward` with cached weights, in FP8 whatever AUTO would say."""
        gate_up, down = self.weights
        caches = fp8moe.WeightCache(gate_up), fp8moe.WeightCache(down)
        config = fp8moe.FP8Config(allow_bf16=False)
        return lambda: fp8moe.moe_forward(*self.tokens, *self.weights, config=config, weight_caches=caches)


def other_layer(
    problem: LayerProblem, experts: QuantizedExperts, *, in_loop: bool = False, rank_one: bool = False,
    reads: bool = False,
) -> Layer:  # fmt: skip
    """The layer with rows quantized in the loops of the products, with products added up one by one (both on a GPU
    alone), with groups planned anew for each of the four steps and the largest read on the host; or all of these."""
    hidden, topk_ids, topk_weights = problem.tokens
    gate_up, down = experts.gate_up, experts.down
    data = [w.data.transpose(1, 2).contiguous() if rank_one else w.data for w in (gate_up, down)]
    tile, act_tile = experts.activation_tiles

    def plan() -> tuple[Tensor, Tensor, RowTiles, Tensor, Tensor]:
        ends, choice_row = route_choices(topk_ids, gate_up.data.shape[0])
        tiled = experts.tiled and not (in_loop or rank_one)  # those multiply no row as several
        tiles, row_token, row_weights = plan_choices(ends, choice_row, topk_weights, gate_up.bits, tiled)
        if reads:
            _ = tiles.largest_on_host
        return ends, choice_row, tiles, row_token, row_weights

    def rows_of(x: Tensor, tile: int | None) -> tuple[Tensor, Tensor | None]:
        codes, scale = (x, None) if in_loop else quantize_rows_int8(x, tile)
        return (codes.t().contiguous() if rank_one else codes), scale

    def product(
        number: int, codes: Tensor, scale: Tensor | None, ends: Tensor, tiles: RowTiles, *,
        row_token: Tensor | None = None, row_weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Of gate and up, with the activation behind it, or of down."""
        weight, is_first = (gate_up, down)[number], number == 0
        if in_loop or rank_one:
            return other_ways.other_product(
                codes, scale, weight, data[number], tiles, swiglu=is_first, rank_one=rank_one, a_row=row_token,
                row_weights=row_weights, dtype=hidden.dtype,
            )  # fmt: skip
        return int8_grouped_mm(
            codes, cast(Tensor, scale), data[number], weight.scale, ends, weight.group_size,
            "swiglu" if is_first else None, a_tile=experts.activation_tiles[number], row_source=row_token,
            row_weights=row_weights, out_dtype=hidden.dtype, tiles=tiles,
        )  # fmt: skip

    def layer() -> Tensor:
        ends, choice_row, tiles, row_token, row_weights = plan()
        codes, scale = rows_of(hidden, tile)
        if reads:
            ends, choice_row, tiles, row_token, row_weights = plan()
        act = product(0, codes, scale, ends, tiles, row_token=row_token)
        if reads:
            ends, choice_row, tiles, row_token, row_weights = plan()
        codes, scale = rows_of(act, act_tile)
        if reads:
            ends, choice_row, tiles, row_token, row_weights = plan()
        rows = product(1, codes, scale, ends, tiles, row_weights=row_weights)
        return combine(rows, choice_row, hidden.dtype)

    return layer
