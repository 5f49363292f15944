"""The kernels of a product by themselves: each quantization, the row plan, each GEMM."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.kernels import Check, Kernel, backends_of, of_tiles, row_check, token_check, token_layouts
from fp8moe.bench.problem import Problem, Products
from fp8moe.bench.shapes import Shape
from fp8moe.config import TOKEN_TILES, KernelPreference, ScaleFormat
from fp8moe.gemm.base import Gemm, GroupedGemm
from fp8moe.operands import (
    BLOCK,
    RowOperand,
    TokenGroups,
    TokenLayout,
    TokenOperand,
    WeightOperand,
    in_whole_blocks,
)
from fp8moe.quantize import (
    quantize_rows,
    quantize_rows_and_tokens,
    quantize_tokens,
    quantize_weight_for_dgrad,
    quantize_weight_for_forward,
    quantize_weight_into,
    reference,
)
from fp8moe.quantize.fingerprint import SECTOR, SECTORS
from fp8moe.quantize.transpose_codes import transpose_codes
from fp8moe.quantize.weight_cache import WeightCache
from fp8moe.quantize.weights import Split
from fp8moe.rows.groups import ends_within, plan_groups
from fp8moe.rows.unpad import unpad
from fp8moe.rows.unused_rows import zero_unused_rows_

FORMAT = ScaleFormat.FP32
QuantizeWeight = Callable[[Tensor, ScaleFormat], WeightOperand]


def kernels(shape: Shape, problem: Problem, expected: Products, preferences: set[KernelPreference]) -> Iterator[Kernel]:
    """Every quantization, every GEMM in BF16, and those that the backends of `preferences` can compute."""
    yield from _of_rows(shape, problem, preferences)
    yield from weight_kernels(problem)
    yield from _bf16_gemms(shape, problem, expected)
    yield from gemm_kernels(shape, problem, expected, preferences)


def _of_rows(shape: Shape, problem: Problem, preferences: set[KernelPreference]) -> Iterator[Kernel]:
    m = shape["M"]
    a, d_out, offs = problem.arguments["a"].detach(), problem.d_out, problem.arguments["offs"]
    groups = plan_groups(offs, m)

    def plan_checks(groups: TokenGroups) -> Iterator[Check]:
        rows = torch.arange(m, device=groups.token_row.device)
        yield "row_source[token_row]", _column(groups.row_source[groups.token_row]), _column(rows)

    yield Kernel("plan_groups", lambda: plan_groups(offs, m), lambda groups: (offs, groups), plan_checks)
    yield Kernel(
        "ends_within",
        lambda: ends_within(offs, m),
        lambda ends: (offs, ends),
        lambda ends: [("ends", _column(ends), _column(offs))],
    )
    yield Kernel(
        "quantize_rows",
        lambda: quantize_rows(a, groups, FORMAT),
        lambda rows: (a, rows),
        lambda rows: [row_check(rows, groups, a)],
    )
    for layout in token_layouts(preferences):
        yield Kernel(
            f"quantize_tokens, {layout.value}",
            partial(quantize_tokens, a, groups, FORMAT, layout),
            lambda tokens: (a, tokens),
            lambda tokens: [token_check(tokens, groups, a)],
        )
        for token_tile in TOKEN_TILES:
            yield Kernel(
                f"quantize_rows_and_tokens, {layout.value}{of_tiles(token_tile)}",
                partial(quantize_rows_and_tokens, a, groups, FORMAT, layout, token_tile),
                lambda both: (a, *both),
                lambda both: [row_check(both[0], groups, a), token_check(both[1], groups, a)],
            )
    padded = reference.gather_padded_rows(d_out, groups).to(a.dtype)
    yield Kernel(
        "unpad",
        lambda: unpad(padded, groups, torch.empty_like(d_out)),
        lambda out: (d_out, out),  # of what is padded, no more is read
        lambda out: [("rows", out, d_out)],
    )
    # Here every row is used: what it costs to find that out.
    yield Kernel(
        "zero_unused_rows_",
        lambda: zero_unused_rows_(padded[:m], offs),
        lambda out: [offs[-1:]],
        lambda out: [("rows", out, padded[:m])],
    )


def weight_kernels(problem: Problem, split: Split = Split.WHOLE) -> Iterator[Kernel]:
    """The weight's quantizations: without a `WeightCache`, one operand at a time, and with one. `split` says into which
    parts the weight is divided."""
    w = problem.arguments["w"].detach()
    (e, n, k), parts = w.shape, split.parts(w)
    n, k = split.padded(n), in_whole_blocks(k)

    def checks(weight: WeightOperand, for_dgrad: bool = False) -> list[Check]:
        held = torch.cat(
            [F.pad(part.float(), (0, -part.shape[2] % BLOCK, 0, -part.shape[1] % BLOCK)) for part in parts], 1
        )
        return [("weight", reference.dequantize_weight(weight), held.transpose(1, 2) if for_dgrad else held)]

    for name, quantize in (("forward", quantize_weight_for_forward), ("dgrad", quantize_weight_for_dgrad)):
        yield Kernel(
            f"quantize_weight_for_{name}",
            partial(quantize, w, FORMAT, split),
            lambda weight: (w, weight),
            partial(checks, for_dgrad=name == "dgrad"),
        )

    def into() -> tuple[WeightOperand, WeightOperand]:
        scale = torch.empty(e, n // BLOCK, k // BLOCK, device=w.device)
        forward, dgrad = (w.new_empty(e, *sizes, dtype=torch.float8_e4m3fn) for sizes in ((n, k), (k, n)))
        quantize_weight_into(parts, FORMAT, scale, forward, dgrad)
        return WeightOperand(forward, scale), WeightOperand(dgrad, scale.transpose(1, 2))

    yield Kernel(
        "quantize_weight_into",
        into,
        lambda both: (w, both[0], both[1].data),
        lambda both: [*checks(both[0]), *checks(both[1], for_dgrad=True)],
    )
    codes = quantize_weight_for_forward(w, FORMAT, split)
    yield Kernel(
        "transpose_codes",
        lambda: transpose_codes(codes.data),
        lambda transposed: (codes.data, transposed),
        lambda transposed: checks(WeightOperand(transposed, codes.scale.transpose(1, 2)), for_dgrad=True),
    )
    weight_cache = WeightCache(w)
    hashed = torch.empty(w.numel() // BLOCK**2 * SECTORS * SECTOR, dtype=w.dtype, device="meta")

    def use() -> WeightOperand:
        return weight_cache.operand(w, FORMAT, for_dgrad=False, split=split)

    yield Kernel("WeightCache, unchanged", use, lambda weight: [hashed], checks)

    def use_changed() -> WeightOperand:
        weight_cache.invalidate()
        return use()

    yield Kernel("WeightCache, changed", use_changed, lambda weight: (w, weight, weight.data), checks)


def _bf16_gemms(shape: Shape, problem: Problem, expected: Products) -> Iterator[Kernel]:
    a, w = (problem.arguments[name].detach() for name in ("a", "w"))
    d_out, offs = problem.d_out, problem.arguments["offs"]
    for name, left, right, product in (
        ("forward", a, w.transpose(1, 2), "out"),
        ("dgrad", d_out, w, "d_a"),
        ("wgrad", d_out.t(), a, "d_w"),
    ):
        yield Kernel(
            f"BF16 {name}",
            partial(F.grouped_mm, left, right, offs=offs),
            partial(_with, left, right),
            _product_check(product, expected),
            _gemm_flops(shape),
            is_bf16=True,
        )


def gemm_kernels(
    shape: Shape, problem: Problem, expected: Products, preferences: set[KernelPreference]
) -> Iterator[Kernel]:
    """Every GEMM that the backends of `preferences` can run. Operands are made when one is first needed."""
    a, w, d_out = problem.arguments["a"].detach(), problem.arguments["w"].detach(), problem.d_out
    groups = plan_groups(problem.arguments["offs"], shape["M"])

    @cache
    def rows(x: Tensor) -> RowOperand:
        return quantize_rows(x, groups, FORMAT)

    @cache
    def tokens(x: Tensor, layout: TokenLayout, token_tile: int) -> TokenOperand:
        return quantize_tokens(x, groups, FORMAT, layout, token_tile)

    @cache
    def weight(quantize: QuantizeWeight) -> WeightOperand:
        return quantize(w, FORMAT)

    def m_grouped(preference: KernelPreference, backend: GroupedGemm, gemm: Gemm) -> Kernel:
        forward = gemm is Gemm.FORWARD
        x, quantize = (a, quantize_weight_for_forward) if forward else (d_out, quantize_weight_for_dgrad)
        num_features = shape["N"] if forward else shape["K"]
        return Kernel(
            f"{preference.value} {gemm.value}",
            lambda: backend.m_grouped(rows(x), weight(quantize), groups, a.dtype, num_features),
            lambda out: (rows(x), weight(quantize), out),
            _product_check("out" if forward else "d_a", expected),
            _gemm_flops(shape),
        )

    def k_grouped(preference: KernelPreference, backend: GroupedGemm, token_tile: int) -> Kernel:
        layout = backend.token_layout
        return Kernel(
            f"{preference.value} wgrad{of_tiles(token_tile)}",
            lambda: backend.k_grouped(tokens(d_out, layout, BLOCK), tokens(a, layout, token_tile), groups, a.dtype),
            lambda d_w: (tokens(d_out, layout, BLOCK), tokens(a, layout, token_tile), d_w),
            _product_check("d_w", expected),
            _gemm_flops(shape),
        )

    for preference, backend in backends_of(preferences).items():
        runs = {
            gemm
            for gemm in Gemm
            if not backend.missing(gemm, a.device) and not backend.missing_for_sizes(gemm, shape["N"], shape["K"])
        }
        yield from (m_grouped(preference, backend, gemm) for gemm in (Gemm.FORWARD, Gemm.DGRAD) if gemm in runs)
        # The others compute no otherwise with longer tiles.
        tiles = TOKEN_TILES if preference is KernelPreference.TRITON else TOKEN_TILES[:1]
        yield from (k_grouped(preference, backend, token_tile) for token_tile in tiles if Gemm.WGRAD in runs)


def _with(left: Tensor, right: Tensor, product: Tensor) -> tuple[Tensor, ...]:
    return left, right, product


def _gemm_flops(shape: Shape) -> int:
    """Of forward, dgrad or wgrad."""
    return 2 * shape["M"] * shape["N"] * shape["K"]


def _product_check(name: str, expected: Products) -> Callable[[Tensor], list[Check]]:
    return lambda product: [(name, product, expected[name])]


def _column(numbers: Tensor) -> Tensor:
    """In rows of one: each must be right."""
    return numbers.float()[:, None]
