"""Every kernel of the layer by itself: its own, and those of its two products.

They work on the layer's routing, and on random rows in BF16 in the place of the products.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.kernels import Check, Kernel, of_tiles, row_check, sectors_of_every, token_check, token_layouts
from fp8moe.bench.layer.experts import experts_of
from fp8moe.bench.problem import Problem, Products, random_normal
from fp8moe.bench.product.kernels import gemm_kernels, weight_kernels
from fp8moe.bench.shapes import Shape, product_shape
from fp8moe.bench.variants import bf16_op
from fp8moe.config import TOKEN_TILES, KernelPreference, ScaleFormat
from fp8moe.gate import SWIGLU, GatedActivation
from fp8moe.operands import BLOCK, LongTiles, RowOperand, TokenGroups
from fp8moe.quantize import (
    quantize_rows,
    quantize_rows_and_tokens,
    quantize_tokens,
    reference,
    sample_sums,
    swiglu_reference,
)
from fp8moe.quantize.messages import (
    Choices,
    Messages,
    dequantize,
    pack,
    requantize_messages,
    spread_messages,
)
from fp8moe.quantize.spread_rows import quantize_and_spread_rows
from fp8moe.quantize.swiglu_backward import quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import SwiGLUForward, quantize_swiglu, quantize_swiglu_forward
from fp8moe.quantize.swiglu_quantize import QuantizedActivation, swiglu_quantize
from fp8moe.quantize.weights import Split
from fp8moe.rows.combine import combine, combine_by_loop
from fp8moe.rows.not_finite import note_not_finite
from fp8moe.rows.part_sums import sums_at_rows
from fp8moe.rows.ranks import choose_ranks
from fp8moe.rows.routing import Routing, route_by_sort, route_choices

FORMAT = ScaleFormat.FP32
RANKS = 2
"""Among which messages are sent."""
SEED = 1


def kernels(shape: Shape, problem: Problem, expected: Products, preferences: set[KernelPreference]) -> Iterator[Kernel]:
    """Routing, the quantizations around the products, the sum of each token's rows, and the products.

    The backends of `preferences` decide the layouts of token operands, and whose GEMMs there are.
    """
    hidden, w_gate_up, w_down = (problem.arguments[name].detach() for name in ("hidden", "w_gate_up", "w_down"))
    ids, topk_weights = problem.arguments["topk_ids"], problem.arguments["topk_weights"].detach()
    _, _, h, i, e = shape.sizes
    routing = Routing.from_topk(ids, e, topk_weights)
    yield Kernel(
        "Routing.from_topk",
        lambda: Routing.from_topk(ids, e, topk_weights),
        lambda routing: (ids, routing),
        partial(_map_checks, ids, topk_weights, e),
    )
    experts = experts_of(shape.name)
    bias = problem.arguments["b_gate_up"].detach() if experts.biases else None
    act = GatedActivation(i, experts.gate, bias, experts.interleaved)
    yield from _activation(act, routing, cast(Tensor, routing.row_weights), preferences)

    groups, gathering = routing.groups, routing.groups.gathering(routing.row_token)
    tokens = hidden[routing.row_token[groups.token_row]]
    yield Kernel(
        "quantize_and_spread_rows",
        lambda: quantize_and_spread_rows(hidden, gathering, routing.choice_row, FORMAT),
        lambda rows: (hidden, rows),
        lambda rows: [row_check(rows, groups, tokens)],
    )
    for layout in token_layouts(preferences):
        for token_tile in TOKEN_TILES:
            yield Kernel(
                f"quantize_tokens, gathering, {layout.value}{of_tiles(token_tile)}",
                partial(quantize_tokens, hidden, gathering, FORMAT, layout, token_tile),
                lambda made: (hidden, made),
                lambda made: [token_check(made, groups, tokens)],
            )
            yield Kernel(
                f"quantize_rows_and_tokens, gathering, {layout.value}{of_tiles(token_tile)}",
                partial(quantize_rows_and_tokens, hidden, gathering, FORMAT, layout, token_tile),
                lambda both: (hidden, *both),
                lambda both: [row_check(both[0], groups, tokens), token_check(both[1], groups, tokens)],
            )
    yield from _messages(hidden, Choices(ids, topk_weights, -(-e // RANKS)), routing, preferences)
    outputs = random_normal(hidden.device, SEED)(groups.num_rows, h)
    yield Kernel(
        "combine",
        lambda: combine(outputs, routing.choice_row, hidden.dtype),
        lambda out: (outputs, out),
        lambda out: [("sums", out, combine_by_loop(outputs, routing.choice_row, hidden.dtype))],
    )
    yield from _watching(hidden, gathering)
    split = Split.INTERLEAVED if experts.interleaved else Split.HALVES
    for name, n, k, weight, parts in (("gate_up", 2 * i, h, w_gate_up, split), ("down", h, i, w_down, Split.WHOLE)):
        product = product_shape(groups.num_rows, n, k, e)
        yield from _product(name, product, weight, parts, problem, groups.ends, preferences)


def _watching(hidden: Tensor, gathering: TokenGroups) -> Iterator[Kernel]:
    """What a monitor launches: in every step, and in one that is sampled."""
    sectors = sectors_of_every(BLOCK, hidden)

    def look(x: Tensor) -> Tensor:
        first = torch.zeros(2, dtype=torch.int64, device=hidden.device)
        note_not_finite(x, 1, x, BLOCK, first, 1)
        return first

    def found(first: Tensor) -> Iterator[Check]:
        bad = hidden.clone()
        bad[-1, 0] = torch.nan
        for name, as_it_must_be in (("nothing found", first == 0), ("NaN found", look(bad) == 1)):
            yield name, as_it_must_be.float()[:, None], torch.ones(2, 1, device=hidden.device)

    yield Kernel("note_not_finite, two", lambda: look(hidden), lambda first: (hidden, sectors, first), found)
    source = gathering.row_source[: sample_sums.MAX_BLOCKS * BLOCK].long()
    sample = sample_sums.sample_of(hidden, source, ())

    def measure() -> Tensor:
        sums = torch.zeros(2, sample_sums.NUM_SUMS, dtype=torch.float64, device=hidden.device)
        sample_sums.add_sample_sums(hidden, source, (), FORMAT, by_row=sums[0], by_token=sums[1])
        return sums

    def sums_checks(sums: Tensor) -> Iterator[Check]:
        for name, made, tiles in (
            ("rows", sums[0], sample_sums.row_tiles(sample)),
            ("tokens", sums[1], sample_sums.token_tiles(sample)),
        ):
            right = sample_sums.sums_of(tiles, FORMAT)
            scale = right.clamp(min=1e-300)  # each number must be right, large or small
            yield f"sums of {name}", (made / scale)[:, None], (right / scale)[:, None]

    yield Kernel("add_sample_sums", measure, lambda sums: (sample.to(hidden.dtype), source, sums), sums_checks)


def _map_checks(ids: Tensor, topk_weights: Tensor, num_experts: int, routing: Routing) -> Iterator[Check]:
    expected = route_by_sort(ids, topk_weights, num_experts)
    for index, (made, right) in enumerate(zip(routing.tensors, expected, strict=True)):
        equal = (made == right).float().flatten()[:, None]  # in rows of one: each number must be right
        yield f"map {index}", equal, torch.ones_like(equal)


def _messages(
    hidden: Tensor, choices: Choices, routing: Routing, preferences: set[KernelPreference]
) -> Iterator[Kernel]:
    """What expert parallelism on two ranks sends of these tokens; and the operands of rows that copy messages."""
    num_tokens, num_choices = choices.ids.shape
    first_rank, _ = choose_ranks(choices.ids, RANKS, choices.num_experts)
    _, slots = route_choices(first_rank, RANKS)
    sent = slots[slots >= 0].long()
    for in_fp8 in (True, False):
        yield Kernel(
            f"pack, {'e4m3' if in_fp8 else 'bf16'}",
            partial(pack, hidden, slots, num_tokens * min(num_choices, RANKS), in_fp8, choices),
            lambda made: (hidden, choices.ids, choices.weights, slots, made.data[: len(sent)]),
            lambda made: [("messages", _values(made)[sent], hidden[torch.where(slots >= 0)[0]].float())],
        )
    own = torch.arange(num_tokens, dtype=torch.int32, device=hidden.device)[:, None]
    messages = pack(hidden, own, num_tokens, in_fp8=True)
    groups, gathering = routing.groups, routing.groups.gathering(routing.row_token)
    tokens = hidden[routing.row_token[groups.token_row]]
    yield Kernel(
        "spread_messages",
        partial(spread_messages, messages, gathering, routing.choice_row),
        lambda rows: (messages.data, rows),
        lambda rows: [row_check(rows, groups, tokens)],
    )
    for layout in token_layouts(preferences):
        yield Kernel(
            f"requantize_messages, {layout.value}",
            partial(requantize_messages, messages, gathering, layout),
            lambda made: (messages.data, made),
            lambda made: [token_check(made, groups, tokens)],
        )


def _values(messages: Messages) -> Tensor:
    return dequantize(messages) if messages.layout.in_fp8 else messages.values.float()


def _activation(
    act: GatedActivation, routing: Routing, weights: Tensor, preferences: set[KernelPreference]
) -> Iterator[Kernel]:
    normal, groups = random_normal(weights.device, SEED), routing.groups
    gate_up = swiglu_reference.padded(normal(groups.num_rows, act.width), act)  # (M, 2Ip)
    d_activation = normal(groups.num_rows, act.num_features)
    d_activation = F.pad(d_activation, (0, act.padded_features - act.num_features))  # (M, Ip)
    activation = swiglu_reference.swiglu(gate_up, weights, act, groups)  # (M, I)

    def forward(token_tile: int, x_rows: bool = False) -> SwiGLUForward:
        return quantize_swiglu_forward(
            gate_up, groups, FORMAT, token_tile=token_tile, x_rows=x_rows, row_weights=weights, act=act
        )

    def stored_checks(made: SwiGLUForward) -> Iterator[Check]:
        yield row_check(made.rows, groups, activation)
        name, actual, expected = row_check(cast(RowOperand, made.x_rows), groups, gate_up)
        yield f"{name} of x", actual, expected

    def long_tile_checks(made: SwiGLUForward) -> Iterator[Check]:
        tiles = cast(LongTiles, made.long_tiles)
        used = int(groups.padded_ends[-1]) // BLOCK
        yield row_check(made.rows, groups, activation)
        yield (
            "maxima",
            tiles.amax[:used],
            reference.measure_long_tiles(activation, groups, tiles.token_tile).amax[:used],
        )

    def backward_checks(x: Tensor, made: Any) -> Iterator[Check]:
        d_x, d_weights = swiglu_reference.swiglu_backward(d_activation, x, weights, act, groups)
        yield row_check(made.d_x_rows, groups, swiglu_reference.padded(d_x, act))
        yield token_check(made.d_x_tokens, groups, swiglu_reference.as_in_parameters(d_x, act), "d_x_tokens")
        yield token_check(made.act_tokens, groups, swiglu_reference.swiglu(x, weights, act, groups), "act_tokens")
        yield "d_row_weights", sums_at_rows(made.d_row_weights, groups.ends), d_weights
        if act.bias is not None:
            d_bias = swiglu_reference.bias_gradient(d_x, groups)
            yield "d_bias", made.d_bias, swiglu_reference.as_in_parameters(d_bias, act)

    yield Kernel(
        "quantize_swiglu",
        lambda: quantize_swiglu(gate_up, groups, FORMAT, row_weights=weights, act=act),
        lambda operands: (gate_up, operands[0]),
        lambda operands: [row_check(operands[0], groups, activation)],
    )
    if act.gate == SWIGLU and act.bias is None and act.num_features % BLOCK == 0:  # it computes no other
        yield Kernel(
            "swiglu_quantize",
            lambda: swiglu_quantize(gate_up, row_weights=weights),
            lambda made: (gate_up, made.data, made.scale),
            lambda made: [("rows", _dequantized(made), activation)],
        )
    for token_tile in TOKEN_TILES[1:]:
        yield Kernel(
            f"quantize_swiglu_forward{of_tiles(token_tile)}",
            partial(forward, token_tile),
            lambda made: (gate_up, made.rows, made.long_tiles),
            long_tile_checks,
        )
    yield Kernel(
        "quantize_swiglu_forward, FP8 storage",
        partial(forward, BLOCK, x_rows=True),
        lambda made: (gate_up, made.rows, made.x_rows),
        stored_checks,
    )
    stored = quantize_rows(gate_up, groups, FORMAT)
    sources: list[tuple[Tensor | RowOperand, Tensor, int, str]]
    sources = [(gate_up, gate_up, token_tile, of_tiles(token_tile)) for token_tile in TOKEN_TILES]
    sources.append((stored, swiglu_reference.stored_values(stored, groups), BLOCK, ", FP8 storage"))

    def touched(x: Tensor | RowOperand, made: Any) -> tuple[Any, ...]:
        return d_activation, x, made.d_x_rows, made.d_x_tokens, made.act_tokens

    for layout in token_layouts(preferences):
        for x, values, token_tile, how in sources:
            yield Kernel(
                f"quantize_swiglu_backward, {layout.value}{how}",
                partial(
                    quantize_swiglu_backward,
                    d_activation,
                    x,
                    groups,
                    FORMAT,
                    d_row_weights=True,
                    d_bias=act.bias is not None,
                    layout=layout,
                    row_weights=weights,
                    act=act,
                    long_tiles=None if token_tile == BLOCK else forward(token_tile).long_tiles,
                ),
                partial(touched, x),
                partial(backward_checks, values),
            )


def _dequantized(made: QuantizedActivation) -> Tensor:
    return (made.data.float().unflatten(1, (-1, BLOCK)) * made.scale[:, :, None]).flatten(1)


def _product(
    name: str, shape: Shape, weight: Tensor, split: Split, layer: Problem, ends: Tensor,
    preferences: set[KernelPreference],
) -> Iterator[Kernel]:  # fmt: skip
    """Of random rows with this weight."""
    m, n, k, _ = shape.sizes
    normal = random_normal(weight.device, SEED)
    arguments = {"a": normal(m, k).requires_grad_(), "w": weight.detach().requires_grad_(), "offs": ends}
    problem = Problem(arguments, normal(m, n), layer.group_sizes)
    expected = problem.products(bf16_op)
    for kernel in (*weight_kernels(problem, split), *gemm_kernels(shape, problem, expected, preferences)):
        yield replace(kernel, name=f"{name}: {kernel.name}")
