"""What each rank asserts: every function here whose name begins with `case_`. All ranks run them in the same order.

A rank that stops in a case leaves the others waiting for it. So what may be wrong on one rank alone is noted, and the
case goes on (`same_bits`, `close`, `expect`).
"""

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fp8moe import ActivationStorage, FP8Config, Gate, ScaleFormat, WeightCache
from fp8moe.distributed import Arrival, Dispatch, ExpertParallelExperts, TorchExchange, ep_moe_forward
from fp8moe.quantize import messages
from tests.distributed.problems import (
    OF_TOKENS,
    POW2,
    H,
    I,
    Problem,
    Results,
    anything,
    differ_in_rank,
    exactly,
    in_one_process,
    in_parallel,
)
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr

WORLD = None
BOTH = (Dispatch.FP8, Dispatch.BF16)


@dataclass
class Rank:
    number: int
    count: int

    def sizes(self, *sizes: int) -> list[int]:
        """Tokens of each rank, these by turns."""
        return [sizes[rank % len(sizes)] for rank in range(self.count)]


NOTED: list[str] = []
"""What was wrong in the case that runs, and where."""


def expect(condition: object, words: object = "") -> None:
    """Note it if the condition is not true."""
    if not condition:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
        NOTED.append(f"{' '.join(frame for frame in frames if 'cases.py' in frame)}: {words}")


def same_bits(actual: Results, expected: Results, names: Sequence[str] = OF_TOKENS) -> None:
    expect(any(expected[name].any() or not expected[name].numel() for name in names), "all zeros")
    for name in names:
        try:
            assert_same_bits(actual[name], expected[name])
        except AssertionError as error:
            expect(False, f"{name}: {error}")


def close(actual: Results, expected: Results, decibels: float, names: Sequence[str] | None = None) -> None:
    for name in expected if names is None else names:
        expect(actual[name].shape == expected[name].shape, name)
        if expected[name].any():
            found = sqnr(actual[name], expected[name])
            expect(found >= decibels, f"{name}: {found:.1f} dB")
        else:
            expect(not actual[name].any(), f"{name}: not zeros")


def alike(actual: Results, expected: Results, names: Sequence[str] = OF_TOKENS) -> None:
    """The same, but for what depends on the CPU: the order of sums in products of other sizes or strides."""
    close(actual, expected, 55, names)


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def case_where_no_experts_of_a_token_share_a_rank_it_is_one_process(rank: Rank) -> None:
    for k, dispatch in ((2, Dispatch.FP8), (1, Dispatch.FP8), (2, Dispatch.BF16)):
        problem = Problem.draw(rank.sizes(90, 33), 2, k, differ_in_rank)
        expected = in_one_process(problem, rank.number)
        actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch)
        alike(actual, expected)
        close(actual, expected, 50)


def case_where_products_are_exact_all_bits_are_those_of_one_process(rank: Rank) -> None:
    problem = Problem.exact(rank.sizes(90, 33), 2, 2)
    expected = in_one_process(problem, rank.number, gate=Gate.relu_squared())
    for dispatch, room in product(BOTH, ({}, {"capacity": 90})):
        actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch, gate=Gate.relu_squared(), **room)
        same_bits(actual, expected, list(expected))
    expect(all((x != 0).float().mean() > 0.001 for x in expected.values()), "nearly all zeros")


def case_experts_that_share_a_rank_are_added_up_there_in_bf16(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(90, 33), 3, 4)
    expected = in_one_process(problem, rank.number)
    for dispatch in BOTH:
        actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch)
        close(actual, expected, 48)
        alike(actual, expected, ["topk_weights"])


def case_repeated_experts_more_choices_than_experts_and_ids_of_none(rank: Rank) -> None:
    for num_experts, k in ((1, 5), (3, 7)):
        problem = Problem.draw(rank.sizes(40, 65), num_experts, k, anything)
        expected = in_one_process(problem, rank.number)
        for dispatch in BOTH:
            close(in_parallel(problem, rank.number, WORLD, dispatch=dispatch), expected, 45)


def case_ranks_without_tokens_and_without_rows(rank: Rank) -> None:
    """No tokens, none that travel, all to one rank."""
    some = Problem.draw([0] + [50] * (rank.count - 1), 2, 2)
    nowhere = Problem.draw([20] * rank.count, 2, 2)
    nowhere.ids[nowhere.tokens_of(1)] = -1
    one = Problem.draw([20] * rank.count, 2, 3)
    one.ids %= 2
    empty = Problem.draw([0] * rank.count, 2, 2)
    for problem in (some, nowhere, one, empty):
        expected = in_one_process(problem, rank.number)
        for options in ({}, {"dispatch": Dispatch.BF16}, {"capacity": 50}):
            actual = in_parallel(problem, rank.number, WORLD, **options)
            close(actual, expected, 45)
            expect(actual["out"].shape == (problem.sizes[rank.number], H))
    expect(not in_parallel(nowhere, rank.number, WORLD)["out"].any() or rank.number != 1)


def case_heavy_tails_cost_what_they_cost_one_process(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(48, 30), 2, 2)
    outliers = torch.rand(problem.hidden.shape, generator=torch.Generator().manual_seed(1)) < 0.002
    problem.hidden = torch.where(outliers, problem.hidden * 200, problem.hidden)
    problem.dout = torch.where(outliers.flip(0), problem.dout * 200, problem.dout)
    exact, alone = exactly(problem, rank.number), in_one_process(problem, rank.number)
    actual = in_parallel(problem, rank.number, WORLD)
    for name, x in exact.items():
        expect(sqnr(alone[name], x) > 18, name)
        expect(sqnr(actual[name], x) > sqnr(alone[name], x) - 0.3, name)


def case_other_sizes_and_dtypes(rank: Rank) -> None:
    """Features in no whole blocks; all tensors in bf16; weights of the router in float64."""
    for hidden_size, intermediate_size in ((200, 72), (129, 130)):
        problem = Problem.draw(
            rank.sizes(40, 20), 2, 2, differ_in_rank, dtype=torch.bfloat16, hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )  # fmt: skip
        problem.weights = problem.weights.double()
        expected = in_one_process(problem, rank.number)
        for dispatch in BOTH:
            actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch)
            alike(actual, expected)
            close(actual, expected, 48)
        expect(actual["out"].dtype == actual["hidden"].dtype == actual["w_down"].dtype == torch.bfloat16)


def case_options_of_the_computation(rank: Rank) -> None:
    configs = (
        replace(POW2, activation_storage=ActivationStorage.FP8),
        *(replace(POW2, wgrad_token_tile=tile) for tile in (128, 512)),
        replace(POW2, keep_quantized_weights=True),
    )
    problem = Problem.draw(rank.sizes(90, 33), 2, 2, differ_in_rank)
    for config in configs:
        expected = in_one_process(problem, rank.number, config=config)
        actual = in_parallel(problem, rank.number, WORLD, config=config)
        alike(actual, expected)
        close(actual, expected, 45)


def case_scales_of_any_value_inside(rank: Rank) -> None:
    """Rows travel with powers of two all the same."""
    problem = Problem.draw(rank.sizes(40, 33), 2, 2)
    exact = exactly(problem, rank.number)
    actual = in_parallel(problem, rank.number, WORLD, config=FP8Config())
    alone = in_one_process(problem, rank.number, config=FP8Config())
    for name, x in exact.items():
        expect(sqnr(actual[name], x) > sqnr(alone[name], x) - 1, name)
    same_bits(actual, in_parallel(problem, rank.number, WORLD, config=FP8Config()), list(exact))


def case_gates_biases_and_interleaved_weights(rank: Rank) -> None:
    gate = Gate.clamped_swiglu(1.5, alpha=1.702, up_offset=1.0)
    problem = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    experts = problem.experts_of(rank.number)
    b_gate_up, b_down = (0.3 * torch.randn(rank.count * 2, size) for size in (2 * I, H))
    options: dict[str, Any] = {"gate": gate, "interleaved": True}
    for dispatch, room in product(BOTH, ({}, {"capacity": 40})):
        biases = b_gate_up.clone().requires_grad_(), b_down.clone().requires_grad_()
        local = [b.detach()[experts].clone().requires_grad_() for b in biases]
        expected = in_one_process(problem, rank.number, biases=biases, **options)
        with poisoned_messages():
            actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch, biases=tuple(local), **options, **room)
        # A gradient of the bias is a sum of what travelled.
        close(actual, expected, 30 if dispatch is Dispatch.FP8 else 40)
        for whole, own in zip(biases, local, strict=True):
            expect(sqnr(grad_of(own), grad_of(whole)[experts]) > (25 if dispatch is Dispatch.FP8 else 40))
    alone = problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    bias = b_down[experts].clone().requires_grad_()
    tokens = alone.tokens_of(rank.number)
    arguments = alone.hidden[tokens], alone.ids[tokens], alone.weights[tokens]
    weights = alone.w_gate_up[experts], alone.w_down[experts]
    ep_moe_forward(*arguments, *weights, WORLD, biases=(None, bias)).backward(alone.dout[tokens])
    expect(grad_of(bias).any(), "the bias alone gets a gradient")
    up_alone = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank, width=1)
    expected = in_one_process(up_alone, rank.number, gate=Gate.relu_squared())
    alike(in_parallel(up_alone, rank.number, WORLD, gate=Gate.relu_squared()), expected)


def case_pairs_main_grads_and_caches(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    experts, tokens = problem.experts_of(rank.number), problem.tokens_of(rank.number)
    expected = in_one_process(problem, rank.number)
    arguments = (problem.hidden[tokens], problem.ids[tokens], problem.weights[tokens])
    for dispatch in BOTH:
        w_gate_up = problem.w_gate_up[experts].clone().requires_grad_()
        w_down = problem.w_down[experts].clone().requires_grad_()
        pair = w_gate_up[:, :I], w_gate_up[:, I:]
        out = ep_moe_forward(*arguments, pair, w_down, WORLD, config=POW2, dispatch=dispatch)
        out.backward(problem.dout[tokens])
        alike({"out": out}, expected, ["out"])
        expect(sqnr(grad_of(w_gate_up), expected["w_gate_up"]) > 50)

        w_gate_up, w_down = w_gate_up.detach().requires_grad_(), w_down.detach().requires_grad_()
        main_grads = torch.ones_like(w_gate_up), torch.ones_like(w_down)
        caches = (WeightCache(w_gate_up), WeightCache(w_down))
        for _ in range(2):
            out = ep_moe_forward(
                *arguments, w_gate_up, w_down, WORLD, config=POW2, dispatch=dispatch, main_grads=main_grads,
                weight_caches=caches,
            )  # fmt: skip
            out.backward(problem.dout[tokens])
        alike({"out": out}, expected, ["out"])
        expect(w_gate_up.grad is None)
        for main_grad, name in zip(main_grads, ("w_gate_up", "w_down"), strict=True):
            expect(sqnr(main_grad - 1, 2 * expected[name]) > 45)


@contextmanager
def poisoned_messages() -> Iterator[None]:
    """What nobody has written in a message is NaN."""

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(0xFF)

    empty = messages._empty_messages
    with patch.object(messages, "_empty_messages", poisoned):
        yield


def case_with_room_for_all_tokens_nothing_is_left_out(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(40, 25), 3, 4, anything)
    for dispatch in BOTH:
        expected = in_parallel(problem, rank.number, WORLD, dispatch=dispatch)
        dropped = torch.zeros((), dtype=torch.int64)
        with poisoned_messages():
            actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch, capacity=40, dropped=dropped)
        same_bits(actual, expected)
        close(actual, expected, 100)
        expect(dropped == 0)


def case_what_does_not_fit_is_left_out_and_counted(rank: Rank) -> None:
    problem, capacity, count = Problem.draw(rank.sizes(40, 25), 3, 4, anything), 7, 0
    kept = problem.ids.clone()
    for origin in range(rank.count):
        room: dict[int, set[int]] = {}
        for t in range(*problem.tokens_of(origin).indices(len(kept))):
            for j, e in enumerate(problem.ids[t].tolist()):
                if 0 <= e < 3 * rank.count:
                    tokens = room.setdefault(e // 3, set())
                    if t not in tokens and len(tokens) == capacity:
                        kept[t, j] = -1
                        count += origin == rank.number
                    else:
                        tokens.add(t)
    expect(count > 10)
    within = replace(problem, ids=kept)
    for dispatch in BOTH:
        expected = in_parallel(within, rank.number, WORLD, dispatch=dispatch)
        dropped = torch.full((), 5)
        with poisoned_messages():
            actual = in_parallel(problem, rank.number, WORLD, dispatch=dispatch, capacity=capacity, dropped=dropped)
        same_bits(actual, expected)
        close(actual, expected, 100)
        expect(dropped == 5 + count)


def case_rows_that_do_not_fit_are_left_out_and_counted(rank: Rank) -> None:
    """First the first tokens of all ranks, then the second ones."""
    problem, max_rows, count = Problem.draw(rank.sizes(40, 25), 3, 4, anything), 30, 0
    kept = problem.ids.clone()
    for to in range(rank.count):
        came = []
        for origin in range(rank.count):
            tokens = range(*problem.tokens_of(origin).indices(len(kept)))
            chosen = [[j for j, e in enumerate(problem.ids[t].tolist()) if e >= 0 and e // 3 == to] for t in tokens]
            places = [(t, choices) for t, choices in zip(tokens, chosen, strict=True) if choices]
            came += [(place, origin, j, t) for place, (t, choices) in enumerate(places) for j in choices]
        expect(len(came) > max_rows)
        for _, _, j, t in sorted(came)[max_rows:]:
            kept[t, j] = -1
            count += to == rank.number
    within = replace(problem, ids=kept)
    for dispatch in BOTH:
        expected = in_parallel(within, rank.number, WORLD, dispatch=dispatch)
        dropped = torch.zeros((), dtype=torch.int64)
        options = {"dispatch": dispatch, "capacity": 40, "max_rows": max_rows, "dropped": dropped}
        with recording_saved_tensors() as saved:
            actual = in_parallel(problem, rank.number, WORLD, **options)
        close(actual, expected, 100)
        same_bits(actual, expected)
        expect(dropped == count)
        expect((max_rows, 2 * I) in [x.shape for x in saved if x.dtype is torch.bfloat16])
    dropped = torch.zeros((), dtype=torch.int64)
    enough = in_parallel(problem, rank.number, WORLD, capacity=40, max_rows=10_000, dropped=dropped)
    same_bits(enough, in_parallel(problem, rank.number, WORLD))
    expect(dropped == 0)


class _Recorder(TorchExchange):
    """A transport of one's own: it takes notes."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.sent: list[tuple[int, int]] = []

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        self.sent.append((len(x), x.shape[1] * x.itemsize))
        return super().send(x, sent, received)


def case_a_token_travels_once_to_a_rank_in_fp8(rank: Rank) -> None:
    h, k = 1024, 4
    problem = Problem.draw(rank.sizes(40, 25), 3, k, hidden_size=h)
    ranks = [set(row) for row in (problem.ids[problem.tokens_of(rank.number)] // 3).tolist()]
    sent = sum(map(len, ranks))
    expect(sent < len(ranks) * k * 0.9)
    arrived = sum(rank.number in row for row in (problem.ids // 3).tolist())
    codes, choices = h + h // 32, 8 * k
    exchange = _Recorder(WORLD)
    in_parallel(problem, rank.number, exchange)
    sizes, there, back, dout_there, home = exchange.sent
    expect(sizes[0] == rank.count)
    expect(there == (sent, codes + choices))
    expect(back == (arrived, 2 * h))
    expect(dout_there == (sent, codes))
    expect(home == (arrived, 2 * h + choices))
    exchange = _Recorder(WORLD)
    in_parallel(problem, rank.number, exchange, dispatch=Dispatch.BF16, capacity=11)
    expect(exchange.sent[0] == (11 * rank.count, 2 * h + choices))
    expect(len(exchange.sent) == 5)


class _Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique", "is_nonzero")
        self.count += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_reads() -> Iterator[Callable[[], int]]:
    lists, tolist = [], Tensor.tolist

    def recorded(x: Tensor) -> Any:
        lists.append(x)
        return tolist(x)

    with patch.object(Tensor, "tolist", recorded), _Reads() as reads:
        yield lambda: reads.count + len(lists)


def case_the_host_reads_once_and_with_a_capacity_never(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(40, 25), 3, 4, anything)
    for dispatch in BOTH:
        dropped = torch.zeros((), dtype=torch.int64)
        room = {"capacity": 11, "max_rows": 30, "dropped": dropped}
        for options, expected in (({}, 1), ({"capacity": 11}, 0), (room, 0)):
            with counting_reads() as count:
                in_parallel(problem, rank.number, WORLD, dispatch=dispatch, **options)
            expect(count() == expected)
        expect(dropped > 0)


def case_saves_what_came_and_one_activation(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(300, 300), 2, 4)
    rows = int(((problem.ids // 2) == rank.number).sum())
    with recording_saved_tensors() as saved:
        in_parallel(problem, rank.number, WORLD)
    bf16 = [x for x in saved if x.dtype is torch.bfloat16]
    expect([x.shape for x in bf16] == [(rows, 2 * I)])
    arrived = sum(rank.number in row for row in (problem.ids // 2).tolist())
    expect([len(x) for x in saved if x.dtype is torch.uint8] == [arrived])
    expect(all(x.dtype is not torch.float8_e4m3fn for x in saved))
    expect(all(x.dtype is not torch.float32 or x.numel() < rows * H / 8 or x.dim() == 3 for x in saved))


def case_ranks_that_call_it_differently_are_told(rank: Rank) -> None:
    one = rank.number == 1
    problem = Problem.draw([8] * rank.count, 1, 2, hidden_size=128 if one else 256)
    with pytest.raises(ValueError, match=r"rank \d of the group calls .* with H=.*, this rank with H=.*: all ranks"):
        in_parallel(problem, rank.number, WORLD)
    problem = Problem.draw([8] * rank.count, 1, 2)
    with pytest.raises(ValueError, match=r"dispatch=(FP8|BF16).*dispatch=(FP8|BF16)"):
        in_parallel(problem, rank.number, WORLD, dispatch=Dispatch.BF16 if one else Dispatch.FP8)
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    arguments = problem.ids[tokens], problem.weights[tokens], problem.w_gate_up[experts], problem.w_down[experts]
    with pytest.raises(ValueError, match=r"gradients of (nothing|hidden, the output)"):
        ep_moe_forward(problem.hidden[tokens].requires_grad_(one), *arguments, WORLD)


def case_any_subset_of_gradients(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    expected = in_one_process(problem, rank.number)
    inputs = {
        "hidden": problem.hidden[tokens], "topk_weights": problem.weights[tokens],
        "w_gate_up": problem.w_gate_up[experts], "w_down": problem.w_down[experts],
    }  # fmt: skip
    names = list(inputs)
    for dispatch in BOTH:
        for wanted in ([], *([name] for name in names), *pairwise(names)):
            given = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
            hidden, weights, w_gate_up, w_down = given.values()
            out = ep_moe_forward(
                hidden, problem.ids[tokens], weights, w_gate_up, w_down, WORLD, config=POW2, dispatch=dispatch
            )
            alike({"out": out}, expected, ["out"])
            expect(out.requires_grad == bool(wanted))
            if wanted:
                out.backward(problem.dout[tokens])
            for name, x in given.items():
                expect((x.grad is not None) == (name in wanted))
                expect(x.grad is None or sqnr(x.grad, expected[name]) > 50)


def case_gradients_have_none_of_their_own(rank: Rank) -> None:
    problem = Problem.draw([8] * rank.count, 1, 2)
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    for dispatch in BOTH:
        hidden = problem.hidden[tokens].clone().requires_grad_()
        weights = problem.w_gate_up[experts], problem.w_down[experts]
        out = ep_moe_forward(hidden, problem.ids[tokens], problem.weights[tokens], *weights, WORLD, dispatch=dispatch)
        (d_hidden,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            d_hidden.sum().backward()


def case_checkpointing_and_autocast(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    expected = in_parallel(problem, rank.number, WORLD)
    w_gate_up, w_down = (w[experts].clone().requires_grad_() for w in (problem.w_gate_up, problem.w_down))
    hidden = problem.hidden[tokens].clone().requires_grad_()
    arguments = hidden, problem.ids[tokens], problem.weights[tokens], w_gate_up, w_down, WORLD
    out = checkpoint(ep_moe_forward, *arguments, config=POW2, use_reentrant=False)
    out.backward(problem.dout[tokens])
    same_bits({"out": out}, expected, ["out"])
    same_bits({"hidden": grad_of(hidden)}, expected, ["hidden"])
    same_bits({"w_down": grad_of(w_down)}, expected, ["w_down"])
    for dispatch in BOTH:
        with torch.autocast("cpu", torch.bfloat16):
            out = ep_moe_forward(*arguments, config=POW2, dispatch=dispatch)
        same_bits({"out": out}, {"out": expected["out"].bfloat16()}, ["out"])
        out.backward(problem.dout[tokens].bfloat16())


def case_compiled_models_run_it_as_it_is(rank: Rank) -> None:
    problem = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    expected = in_parallel(problem, rank.number, WORLD)

    def layer(hidden: Tensor) -> Tensor:
        weights = problem.w_gate_up[experts], problem.w_down[experts]
        out = ep_moe_forward(hidden / 2, problem.ids[tokens], problem.weights[tokens], *weights, WORLD, config=POW2)
        return 2 * out

    hidden = (2 * problem.hidden[tokens]).requires_grad_()
    with warnings.catch_warnings(action="ignore"):  # Dynamo warns of what it does itself
        out = torch.compile(layer, backend="aot_eager")(hidden)
        out.backward(problem.dout[tokens])
    same_bits({"out": out / 2, "hidden": grad_of(hidden)}, expected, ["out", "hidden"])


def case_the_module(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.count,), mesh_dim_names=("ep",))
    problem = Problem.draw([30] * rank.count, 2, 2)
    tokens, experts = problem.tokens_of(rank.number), problem.experts_of(rank.number)
    module = ExpertParallelExperts(2 * rank.count, H, I, mesh["ep"], config=POW2, cache_weights=True)
    expect({name: p.shape for name, p in module.state_dict().items()} == {
        "w_gate_up": (2, 2 * I, H), "w_down": (2, H, I)
    })  # fmt: skip
    module.load_state_dict({"w_gate_up": problem.w_gate_up[experts], "w_down": problem.w_down[experts]})
    arguments = problem.hidden[tokens], problem.ids[tokens], problem.weights[tokens]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        expected = ep_moe_forward(*arguments, module.w_gate_up.detach(), module.w_down.detach(), WORLD, config=POW2)
        out = module(*arguments)
        same_bits({"out": out}, {"out": expected}, ["out"])
        out.backward(problem.dout[tokens])
        optimizer.step()
    expect(module.dropped == 0)
    limited = ExpertParallelExperts(
        2 * rank.count, H, I, WORLD, config=POW2, dispatch=Dispatch.BF16, capacity=4, max_rows=90, dtype=torch.bfloat16
    )
    expect(limited(*arguments).shape == (30, H))
    dropped = int(limited.dropped)
    expect(dropped > 0)
    copy.deepcopy(limited)(*arguments)
    limited(*arguments)
    expect(limited.dropped == 2 * dropped)
    expect(f"num_ranks={rank.count}, dispatch=BF16, capacity=4, max_rows=90" in repr(limited))
    expect("num_experts=2," in repr(limited))
    with pytest.raises(TypeError, match="dispatch is 'fp8'"):
        ExpertParallelExperts(2 * rank.count, H, I, WORLD, dispatch="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"num_experts is {2 * rank.count + 1}; it must be a positive multiple"):
        ExpertParallelExperts(2 * rank.count + 1, H, I, WORLD)


def case_groups_of_a_part_of_the_ranks(rank: Rank) -> None:
    """Each pair of ranks shares experts of its own."""
    mesh = init_device_mesh("cpu", (rank.count // 2, 2), mesh_dim_names=("dp", "ep"))
    pair, number = divmod(rank.number, 2)
    problem = Problem.draw([40, 33], 2, 2, differ_in_rank, seed=pair)
    alike(in_parallel(problem, number, mesh["ep"]), in_one_process(problem, number))
    with pytest.raises(ValueError, match="group is a mesh of 2 dimensions; it must have one"):
        in_parallel(problem, number, mesh)


def case_scale_format_of_rows_is_not_that_of_the_config(rank: Rank) -> None:
    """What arrives is the same with either: powers of two."""
    problem = Problem.draw(rank.sizes(40, 33), 2, 2, differ_in_rank)
    scales = []
    for scale_format in ScaleFormat:
        exchange = _Copier(WORLD)
        in_parallel(problem, rank.number, exchange, config=FP8Config(scale_format=scale_format))
        scales.append(exchange.messages[1][:, H : H + 8].contiguous().view(torch.float32))
    same_bits({"scales": scales[0]}, {"scales": scales[1]}, ["scales"])
    mantissa, _ = scales[0].frexp()
    expect((mantissa == 0.5).all())


class _Copier(TorchExchange):
    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.messages: list[Tensor] = []

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        self.messages.append(x.clone())
        return super().send(x, sent, received)


CASES: dict[str, Callable[[Rank], None]] = {
    name.removeprefix("case_"): function for name, function in list(globals().items()) if name.startswith("case_")
}
