"""Every kernel of the layer by itself: its own, and those of its two products."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fp8moe.bench.kernels import Check, Kernel, of_tiles, product_kernels, row_check, token_check, token_layouts
from fp8moe.bench.layer import floor
from fp8moe.bench.layer.problem import LayerProblem
from fp8moe.bench.op_problem import OpProblem
from fp8moe.bench.problem import random_normal
from fp8moe.bench.shapes import Shape
from fp8moe.bench.variants import bf16_op
from fp8moe.combine import combine, combine_by_loop
from fp8moe.config import TOKEN_TILES, KernelPreference, ScaleFormat
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenLayout
from fp8moe.quantize import dequantize_rows, quantize_rows, quantize_rows_and_tokens, reference, swiglu_reference
from fp8moe.quantize.swiglu import quantize_swiglu, quantize_swiglu_and_measure, quantize_swiglu_backward, swiglu
from fp8moe.quantize.swiglu_quantize import QuantizedActivation, swiglu_quantize
from fp8moe.quantize.swiglu_reference import GateUpLayout
from fp8moe.routing import Routing, at_rows, route_by_sort

HALVES = GateUpLayout.GATE_UP
SEED = 1


class Rows:
    """What the kernels of one layer work on: its routing, and random rows in BF16 in the place of the products."""

    def __init__(self, problem: LayerProblem) -> None:
        self.routing = Routing.from_topk(problem.topk_ids, problem.shape.e)
        self.groups = self.routing.groups
        self.gathering = self.groups.gathering(self.routing.row_token)
        """The plan by which rows are gathered from the tokens as they are quantized."""
        normal, shape = random_normal(torch.bfloat16, problem.hidden.device, SEED), problem.shape
        self.gate_up = normal(self.groups.num_tokens, 2 * shape.i)
        self.d_activation = normal(self.groups.num_tokens, shape.i)
        self.outputs = normal(self.groups.num_tokens, shape.h)
        self.weights = at_rows(problem.topk_weights.detach(), self.routing.choice_row)
        self.hidden = problem.hidden.detach()

    @property
    def tokens(self) -> Tensor:
        """`(M, H)`: the tokens that the rows copy."""
        return self.hidden[self.routing.row_token[self.groups.token_row]]

    @property
    def activation(self) -> Tensor:
        """fp32 `(M, I)`."""
        return swiglu_reference.swiglu(self.gate_up, HALVES, self.weights, round_through_bf16=False)

    @cached_property
    def stored(self) -> RowOperand:
        """`gate_up` as it is kept in FP8."""
        return quantize_rows(self.gate_up, self.groups, ScaleFormat.FP32)

    def quantize_and_measure(self, token_tile: int) -> tuple[RowOperand, LongTiles]:
        """As forward does where the activation's token tiles are long."""
        return quantize_swiglu_and_measure(
            self.gate_up, self.groups, ScaleFormat.FP32, token_tile, row_weights=self.weights
        )


def layer_kernels(problem: LayerProblem, preferences: Iterable[KernelPreference]) -> list[Kernel]:
    """Routing, the quantizations around the products, the sum of each token's rows, and the products.

    Args:
        problem: the layer.
        preferences: the backends that decide the layouts of token operands.
    """
    rows, sizes = Rows(problem), problem.sizes
    found = [*_routing(problem), *_swiglu(sizes, rows)]
    for layout in token_layouts(preferences):
        found += _tokens(sizes, rows, layout)
    found += _outputs(problem, rows)
    for name, shape, weight in (
        ("gate_up", problem.shape.gate_up, problem.w_gate_up),
        ("down", problem.shape.down, problem.w_down),
    ):
        found += _product(name, shape, weight, problem, rows.groups.ends, preferences)
    return found


def _routing(problem: LayerProblem) -> Iterator[Kernel]:
    ids, num_experts = problem.topk_ids, problem.shape.e

    def checks(routing: Routing) -> Iterator[Check]:
        for index, (made, right) in enumerate(zip(routing.tensors, route_by_sort(ids, num_experts), strict=True)):
            equal = (made == right).float().flatten()[:, None]  # in rows of one: each number must be right
            yield f"map {index}", equal, torch.ones_like(equal)

    yield Kernel(
        "Routing.from_topk",
        floor.route(problem.sizes),
        lambda: Routing.from_topk(ids, num_experts),
        checks,
    )


def _swiglu(s: floor.LayerSizes, r: Rows) -> Iterator[Kernel]:
    yield Kernel(
        "quantize_swiglu",
        floor.swiglu(s),
        lambda: quantize_swiglu(r.gate_up, r.groups, ScaleFormat.FP32, row_weights=r.weights),
        lambda operands: [row_check(operands[0], r.groups, r.activation)],
    )

    yield Kernel(
        "swiglu_quantize",
        floor.swiglu(s),
        lambda: swiglu_quantize(r.gate_up, row_weights=r.weights),
        lambda made: [("rows", _dequantized(made), r.activation)],
    )
    yield Kernel(
        "swiglu, then quantize_rows",
        floor.swiglu(s),
        lambda: quantize_rows(swiglu(r.gate_up, r.weights), r.groups, ScaleFormat.FP32),
        lambda rows: [row_check(rows, r.groups, r.activation)],
    )

    def checks(made: tuple[RowOperand, LongTiles]) -> Iterator[Check]:
        rows, tiles = made
        used = int(r.groups.padded_ends[-1]) // BLOCK
        expected = reference.measure_long_tiles(r.activation, r.groups, tiles.token_tile)
        yield row_check(rows, r.groups, r.activation)
        yield "maxima", tiles.amax[:used], expected.amax[:used]

    for token_tile in TOKEN_TILES[1:]:
        yield Kernel(
            f"quantize_swiglu_and_measure{of_tiles(token_tile)}",
            floor.swiglu(s),
            partial(r.quantize_and_measure, token_tile),
            checks,
        )
    yield Kernel(
        "dequantize_rows",
        floor.dequantize_rows(s),
        lambda: dequantize_rows(r.stored, r.groups, torch.bfloat16),
        lambda rows: [("rows", rows.float(), r.gate_up.float())],
    )


def _dequantized(made: QuantizedActivation) -> Tensor:
    tiles = made.data.float().unflatten(1, (-1, BLOCK)) * made.scale[:, :, None]
    return tiles.flatten(1)


def _tokens(s: floor.LayerSizes, r: Rows, layout: TokenLayout) -> Iterator[Kernel]:
    for token_tile in TOKEN_TILES:
        yield Kernel(
            f"quantize_rows_and_tokens, gathering, {layout.value}{of_tiles(token_tile)}",
            floor.quantize_tokens(s),
            partial(quantize_rows_and_tokens, r.hidden, r.gathering, ScaleFormat.FP32, layout, token_tile),
            lambda both: [row_check(both[0], r.groups, r.tokens), token_check(both[1], r.groups, r.tokens)],
        )

    def checks(made: Any) -> Iterator[Check]:
        d_x, d_weights = swiglu_reference.swiglu_backward(r.d_activation, r.gate_up, HALVES, r.weights)
        yield row_check(made.d_x_rows, r.groups, d_x)
        yield token_check(made.d_x_tokens, r.groups, d_x, "d_x_tokens")
        yield token_check(made.act_tokens, r.groups, r.activation, "act_tokens")
        yield "d_row_weights", made.d_row_weights, d_weights

    for token_tile in TOKEN_TILES:
        yield Kernel(
            f"quantize_swiglu_backward, {layout.value}{of_tiles(token_tile)}",
            floor.swiglu_backward(s),
            partial(
                quantize_swiglu_backward,
                r.d_activation,
                r.gate_up,
                r.groups,
                ScaleFormat.FP32,
                d_row_weights=True,
                layout=layout,
                row_weights=r.weights,
                long_tiles=None if token_tile == BLOCK else r.quantize_and_measure(token_tile)[1],
            ),
            checks,
        )


def _outputs(problem: LayerProblem, r: Rows) -> Iterator[Kernel]:
    choice_row, dtype = r.routing.choice_row, problem.hidden.dtype
    yield Kernel(
        "combine",
        floor.combine(problem.sizes),
        lambda: combine(r.outputs, choice_row, dtype),
        lambda out: [("sums", out, combine_by_loop(r.outputs, choice_row, dtype))],
    )


def _product(
    name: str, shape: Shape, weight: Tensor, problem: LayerProblem, ends: Tensor,
    preferences: Iterable[KernelPreference],
) -> Iterator[Kernel]:  # fmt: skip
    """Of random rows with this weight."""
    normal = random_normal(problem.hidden.dtype, weight.device, SEED)
    product = OpProblem(
        shape,
        problem.routing,
        problem.group_sizes,
        a=normal(shape.m, shape.k).requires_grad_(),
        w=weight.detach().requires_grad_(),
        offs=ends,
        dout=normal(shape.m, shape.n),
    )
    for kernel in product_kernels(product, product.products(bf16_op), preferences):
        yield replace(kernel, name=f"{name}: {kernel.name}")
