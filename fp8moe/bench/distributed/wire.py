"""The collectives by themselves: rows as each dispatch sends them, and the gather of a weight."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.bench.distributed.figures import WireFigures
from fp8moe.bench.distributed.problem import RankProblem
from fp8moe.bench.distributed.ranks import Ranks
from fp8moe.bench.shapes import Shape
from fp8moe.bench.timing import Budget, Region, Stopwatch, measure_in_turns, ready
from fp8moe.distributed import Dispatch, Exchange
from fp8moe.operands import BLOCK
from fp8moe.quantize.messages import MessageLayout

GATHERED_BYTES = 2 * 2**30
"""Of a BF16 weight at most: the gather of more experts takes as much longer."""
PLAIN_ROWS, BF16_ROWS, FP8_ROWS = "rows of all choices, bf16", "messages, bf16", "messages, FP8"
BF16_GATHER, FP8_GATHER = "gather of gate-up, bf16", "gather of gate-up, FP8"


def measure_wire(
    shape: Shape, drawn: RankProblem, ranks: Ranks, exchange: Exchange, stopwatch: Stopwatch, budget: Budget
) -> list[WireFigures]:
    """Each collective, by turns."""
    found: dict[str, tuple[Region, int]] = {}
    once, each = drawn.rows_sent(once=True), drawn.rows_sent(once=False)
    k, h = shape["k"], shape["H"]
    for name, counts, row_bytes in (
        (PLAIN_ROWS, each, 2 * h),
        (BF16_ROWS, once, MessageLayout(h, k, in_fp8=False).num_bytes),
        (FP8_ROWS, once, MessageLayout(h, k, in_fp8=True).num_bytes),
    ):
        sent, received = counts[ranks.rank].tolist(), counts[:, ranks.rank].tolist()
        x = _random_bytes(sum(sent), row_bytes, ranks)
        leaving = int((counts.sum(1) - counts.diagonal()).max()) * row_bytes
        found[name] = partial(_exchanged, exchange, x, sent, received), leaving
    elements = gathered_experts(shape, ranks.count) * 2 * shape["I"] * h
    for name, num_bytes in ((BF16_GATHER, 2 * elements), (FP8_GATHER, elements + elements // BLOCK**2 * 4)):
        shard = -(-num_bytes // ranks.count)
        found[name] = _gather(shard, ranks), shard * (ranks.count - 1)

    laps = measure_in_turns([ready(region) for region, _ in found.values()], stopwatch, budget)
    times = {name: each.whole() for name, each in zip(found, laps, strict=True)}
    against = {FP8_ROWS: BF16_ROWS, FP8_GATHER: BF16_GATHER}
    return [
        WireFigures(
            name, timing, found[name][1], found[name][1] / timing.median_ms / 1e6,
            times[against.get(name, name)].median_ms / timing.median_ms,
        )
        for name, timing in times.items()
    ]  # fmt: skip


def gathered_experts(shape: Shape, num_ranks: int) -> int:
    """How many experts' gate-up weights are gathered: all, or as many as `GATHERED_BYTES` hold; a multiple of the
    ranks."""
    fitting = GATHERED_BYTES // (2 * 2 * shape["I"] * shape["H"])
    return max(min(shape["E"], fitting) // num_ranks, 1) * num_ranks


def wire_ms(dispatch: Dispatch | None, wire: list[WireFigures]) -> float | None:
    """What a step's four exchanges of rows take alone: tokens and their gradients there, sums and theirs back, which
    are BF16 in any case. None if the wire was not measured."""
    times = {figures.name: figures.timing.median_ms for figures in wire}
    if not times:
        return None
    if dispatch is None:
        return 4 * times[PLAIN_ROWS]
    return 2 * times[FP8_ROWS if dispatch is Dispatch.FP8 else BF16_ROWS] + 2 * times[BF16_ROWS]


def _exchanged(exchange: Exchange, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    return exchange.send(x, sent, received).wait()


def _random_bytes(rows: int, row_bytes: int, ranks: Ranks) -> Tensor:
    return torch.randint(256, (rows, row_bytes), dtype=torch.uint8, device=ranks.device)


def _gather(shard_bytes: int, ranks: Ranks) -> Callable[[], object]:
    shard = _random_bytes(1, shard_bytes, ranks)[0]
    whole = torch.empty(ranks.count * shard_bytes, dtype=torch.uint8, device=ranks.device)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
    return lambda: gather(whole, shard)
