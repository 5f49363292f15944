"""What `bench --int8` measures: each section holds the ways to compute one thing against each other, in one run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from fp8moe.bench.graphs import captured
from fp8moe.bench.guard import check
from fp8moe.bench.int8.kernels.other_ways import product_in_bands
from fp8moe.bench.int8.layers import Layer, LayerProblem, other_layer
from fp8moe.bench.measure import Lab
from fp8moe.bench.shapes import layer_shape
from fp8moe.bench.timing import Region, SetUp, Stages, Timing, measure_in_turns, ready
from fp8moe.int8 import (
    QuantizedExperts,
    int8_grouped_mm,
    int8_scaled_mm,
    plan_tiles,
    quantize_rows_int8,
    quantize_weight,
)
from fp8moe.int8.groups import plan_choices
from fp8moe.rows.routing import route_choices

SAME_DB, SIMILAR_DB, INT4_DB = 40.0, 25.0, 12.0
"""How well ways agree that have the same operands, other scales of the rows, and other weights (INT4 leaves 14 dB)."""
ROW_TILES = (None, None)
IN_LOOP_TILES = (128, 128)
DENSE_SIZE = 4096
BANDS = (1, 2, 8, 32, 1 << 20)


@dataclass(frozen=True)
class Row:
    """One way to compute one thing."""

    case: str
    way: str
    timing: Timing
    ratio: float
    """How many times as fast as the first way of its case."""
    gb_s: float | None = None
    """Bytes of weights that must be read, over the time."""
    copy_share: float | None = None
    """That, against the copy rate of the same run."""

    def as_json(self) -> dict[str, object]:
        """For a file."""
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """Where, and how long, and on which sizes."""

    lab: Lab
    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def shape(self, *sizes: int, name: str = "") -> LayerProblem:
        """A layer of these sizes; on a CPU of small ones."""
        t, k, h, i, e = sizes if self.on_gpu else (min(sizes[0], 8), 2, 128, 128, 4)
        return LayerProblem(layer_shape(t, k, h, i, e, name), self.device)


def compare(
    bench: Bench, case: str, ways: dict[str, Layer], min_sqnr_db: float, *, graph: bool = True,
    num_bytes: dict[str, int] | None = None,
) -> list[Row]:  # fmt: skip
    """Check each way against the first, and time them in turns: as graph replays where `graph`, else as the host
    launches them."""
    expected = None
    for way, region in ways.items():
        out = region()
        expected = out if expected is None else expected
        check(f"{case}: {way}", out, expected.to(out.dtype), min_sqnr_db)
    set_ups: list[SetUp] = [_replaying(region) if graph and bench.on_gpu else ready(region) for region in ways.values()]
    laps = measure_in_turns(set_ups, bench.lab.stopwatch, bench.lab.op_budget)
    timings = [each.whole() for each in laps]
    rows = []
    for way, timing in zip(ways, timings, strict=True):
        rate = num_bytes[way] / timing.median_ms / 1e6 if num_bytes else None
        share = None if rate is None else rate / bench.lab.ceilings.copy_gb_s
        rows.append(Row(case, way, timing, timings[0].median_ms / timing.median_ms, rate, share))
    return rows


def hoisting(bench: Bench) -> Iterator[Row]:
    """Rows quantized before the products, or in their loops by each tile of columns again."""
    problem = bench.shape(1600, 8, 2048, 512, 256)
    for bits in (8, 4):
        experts = problem.quantized(bits, IN_LOOP_TILES)
        ways = {"before the product": problem.ours(experts)}
        if bench.on_gpu:
            ways = {"in its loop": other_layer(problem, experts, in_loop=True), **ways}
            ways["before, a scale a row"] = problem.ours(problem.quantized(bits, ROW_TILES))
        yield from compare(bench, f"INT{bits} {problem.shape.title}", ways, SIMILAR_DB)


def small_layer(bench: Bench) -> Iterator[Row]:
    """The matrix unit against products added one by one; one pass over the offsets against four with reads; and all
    together, as the host launches them."""
    problem = bench.shape(97, 4, 512, 1280, 24)
    for bits in (8, 4):
        experts = problem.quantized(bits, ROW_TILES)
        title = f"INT{bits} {problem.shape.title}"
        if bench.on_gpu:
            ways = {"rank-1 sums": other_layer(problem, experts, rank_one=True), "matrix unit": problem.ours(experts)}
            yield from compare(bench, f"{title}, dot", ways, SAME_DB)
        ways = {"four passes, reads": other_layer(problem, experts, reads=True), "one pass": problem.ours(experts)}
        yield from compare(bench, f"{title}, offsets", ways, SAME_DB, graph=False)
        if bench.on_gpu:
            tiled = problem.quantized(bits, IN_LOOP_TILES)
            old = other_layer(problem, tiled, in_loop=True, rank_one=True, reads=True)
            ways = {"all other ways": old, "ours": problem.ours(experts)}
            yield from compare(bench, f"{title}, whole", ways, SIMILAR_DB, graph=False)
            ours = {
                "ours, replayed": problem.ours(experts),
                "ours, tiles of the default": problem.ours(problem.quantized(bits)),
            }
            yield from compare(bench, f"{title}, graph", ours, SIMILAR_DB)


def dense(bench: Bench) -> Iterator[Row]:
    """The dense product against PyTorch's int8 product with scaling, and BF16."""
    size = DENSE_SIZE if bench.on_gpu else 64
    torch.manual_seed(0)
    w = torch.randn(size, size, dtype=torch.bfloat16, device=bench.device)
    codes, scale = quantize_rows_int8(w)
    scale_of_columns = scale.t().contiguous()
    for m in (1024, 2048, 4096, 8192) if bench.on_gpu else (32,):
        x = torch.randn(m, size, dtype=torch.bfloat16, device=bench.device)
        a, a_scale = quantize_rows_int8(x)

        def by_pytorch(a: Tensor = a, a_scale: Tensor = a_scale) -> Tensor:
            return (torch._int_mm(a, codes.t()).float() * a_scale * scale_of_columns).bfloat16()

        compiled = torch.compile(by_pytorch, dynamic=False) if bench.on_gpu else by_pytorch
        ways: dict[str, Layer] = {
            "BF16": partial(torch.mm, x, w.t()),
            "_int_mm + scaling": by_pytorch,
            "_int_mm + scaling, compiled": compiled,
            "int8_scaled_mm": partial(int8_scaled_mm, a, codes.t(), a_scale, scale_of_columns),
        }
        yield from compare(bench, f"({m}, {size}, {size})", ways, SIMILAR_DB)


def layers(bench: Bench) -> Iterator[Row]:
    """The layer against BF16 and FP8, at any number of tokens."""
    whole = bench.shape(1, 8, 2048, 768, 128, name="Qwen3-30B-A3B")
    made = {f"INT{bits}": whole.quantized(bits) for bits in (8, 4)}
    made |= {f"INT{bits}, a scale a row": whole.quantized(bits, ROW_TILES) for bits in (8, 4)}
    counts = (1, 4, 16, 64, 256, 1024, 4096, 8192)
    for num_tokens in (counts[::3] if bench.quick else counts) if bench.on_gpu else (1, 8):
        problem = whole.with_tokens(num_tokens)
        if bench.on_gpu:
            torch.compiler.reset()
        compile_ = torch.compile(fullgraph=True, dynamic=False) if bench.on_gpu else (lambda function: function)
        ways = {"BF16 grouped_mm": problem.bf16(compile_), "FP8": problem.fp8()}
        ways |= {name: problem.ours(experts) for name, experts in made.items()}
        yield from compare(bench, problem.shape.title, ways, INT4_DB)


def few_tokens(bench: Bench) -> Iterator[Row]:
    """Each product of a few tokens: how much of the copy rate it reads the weights at. 256 MB or more, but where the
    title says less."""
    sizes = ((8, 4096, 16384, 8), (8, 2048, 512, 256)) if bench.on_gpu else ((2, 128, 128, 4),)
    counts = (1, 4, 16, 64) if bench.quick else (1, 2, 4, 8, 16, 32, 64)
    for k, h, i, e in sizes:
        whole = bench.shape(1, k, h, i, e)
        for bits in (8, 4):
            for tiles in (ROW_TILES, None):
                experts = whole.quantized(bits, tiles)
                for num_tokens in (counts if e <= 8 else counts[-1:]) if bench.on_gpu else (1,):
                    yield from _products(bench, whole.with_tokens(num_tokens), experts)


def _products(bench: Bench, problem: LayerProblem, experts: QuantizedExperts) -> Iterator[Row]:
    hidden, topk_ids, topk_weights = problem.tokens
    num_experts = experts.gate_up.data.shape[0]
    ends, choice_row = route_choices(topk_ids, num_experts)
    tiles, row_token, row_weights = plan_choices(ends, choice_row, topk_weights, experts.gate_up.bits, experts.tiled)
    touched = int(topk_ids.unique().numel())
    tile, act_tile = experts.activation_tiles
    codes, scale = quantize_rows_int8(hidden, tile)
    up = partial(
        int8_grouped_mm, codes, scale, experts.gate_up.data, experts.gate_up.scale, ends, experts.gate_up.group_size,
        "swiglu", a_tile=tile, row_source=row_token, tiles=tiles,
    )  # fmt: skip
    act_codes, act_scale = quantize_rows_int8(up(), act_tile)
    down = partial(
        int8_grouped_mm, act_codes, act_scale, experts.down.data, experts.down.scale, ends, experts.down.group_size,
        a_tile=act_tile, row_weights=row_weights, tiles=tiles,
    )  # fmt: skip
    for name, weight, product in (("gate-up", experts.gate_up, up), ("down", experts.down, down)):
        num_bytes = (weight.data.nbytes + weight.scale.nbytes) * touched // num_experts
        way = f"tiles {tile or 'row'}, {act_tile or 'row'}: {num_bytes / 1e6:.0f} MB"
        case = f"INT{weight.bits} {problem.shape.title}, {name}"
        yield from compare(bench, case, {way: product}, SAME_DB, num_bytes={way: num_bytes})


def order_of_tiles(bench: Bench) -> Iterator[Row]:
    """A product of many rows with its tiles in bands of several heights: 1 goes along the columns, the highest down the
    rows. What shows why are the counters of L2: see docs/int8.md."""
    rows, n, k, e = (65536, 4096, 4096, 8) if bench.on_gpu else (64, 64, 128, 2)
    torch.manual_seed(0)
    codes, scale = quantize_rows_int8(torch.randn(rows, k, dtype=torch.bfloat16, device=bench.device))
    weight = quantize_weight(torch.randn(e, n, k, dtype=torch.bfloat16, device=bench.device), 8, 128)
    ends = torch.arange(1, e + 1, dtype=torch.int32, device=bench.device) * (rows // e)
    tiles = plan_tiles(ends, rows)
    if bench.on_gpu:
        ways: dict[str, Layer] = {
            f"bands of {band}": partial(product_in_bands, codes, scale, weight, tiles, band, torch.bfloat16)
            for band in BANDS
        }
        yield from compare(bench, f"({rows}, {n}, {k}, {e})", ways, SAME_DB)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "hoisting": hoisting,
    "small": small_layer,
    "dense": dense,
    "layer": layers,
    "few": few_tokens,
    "order": order_of_tiles,
}
"""By what `--only` calls them; `serving` is one more."""


def chosen(only: str | None) -> Sequence[str]:
    """The names of the sections that a text such as `dense,few` asks for.

    Raises:
        ValueError: there is no such section.
    """
    names = [*SECTIONS, "serving"]
    asked = names if only is None else only.split(",")
    for name in asked:
        if name not in names:
            raise ValueError(f"--only {name!r} is not one of {', '.join(names)}")
    return asked


def _replaying(region: Region) -> SetUp:
    """Replays of a graph that is captured once: some ways compile when they are captured."""
    replay = captured(region)

    @contextmanager
    def set_up() -> Iterator[Stages]:
        yield (replay,)

    return set_up
