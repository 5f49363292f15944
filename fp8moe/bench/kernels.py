"""One row of the kernel table, checked and held to its floor. Here, each quantization and each GEMM by itself."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench import floor
from fp8moe.bench.floor import Sizes, Work
from fp8moe.bench.guard import check, poison_freed_memory
from fp8moe.bench.op_problem import OpProblem
from fp8moe.bench.ops import Lab
from fp8moe.bench.problem import Products
from fp8moe.bench.timing import Timing, measure
from fp8moe.config import TOKEN_TILES, KernelPreference, ScaleFormat
from fp8moe.gemm.base import Gemm, GroupedGemm
from fp8moe.gemm.select import BACKENDS
from fp8moe.gemm.unpad import unpad
from fp8moe.gemm.unused_rows import zero_unused_rows_
from fp8moe.groups import TokenGroups, ends_within
from fp8moe.operands import BLOCK, RowOperand, TokenLayout, TokenOperand, WeightOperand
from fp8moe.quantize import (
    quantize_rows,
    quantize_rows_and_tokens,
    quantize_tokens,
    quantize_weight,
    quantize_weight_for_dgrad,
    quantize_weight_for_forward,
    reference,
    requantize_rows_to_tokens,
)

Check = tuple[str, Tensor, Tensor]
"""What is compared, what it is, what it must be."""


@dataclass(frozen=True)
class Kernel:
    """One call of the library."""

    name: str
    work: Work
    run: Callable[[], Any]
    checks: Callable[[Any], Iterable[Check]]
    """What must hold of the result of `run`."""
    is_ours: bool = True


@dataclass(frozen=True)
class KernelMeasurement:
    """The figures of one kernel."""

    name: str
    timing: Timing
    bytes: int
    """Each input and output byte once."""
    flops: int
    gb_s: float
    """Achieved, 1e9 bytes a second."""
    tflop_s: float
    """Achieved, 1e12 operations a second."""
    floor_ms: float | None
    sqnr_db: float
    """The least of its checks."""


def measure_kernel(kernel: Kernel, outputs_like: Products, lab: Lab) -> KernelMeasurement:
    """Check one kernel, then time it.

    Raises:
        WrongResultError: it computed something wrong.
    """
    poison_freed_memory(outputs_like.values())
    result = kernel.run()
    sqnr_db = min(check(*checked).sqnr_db for checked in kernel.checks(result))
    del result
    timing = measure(kernel.run, lab.kernel_stopwatch, lab.kernel_budget)
    work = kernel.work
    return KernelMeasurement(
        name=kernel.name,
        timing=timing,
        bytes=work.bytes,
        flops=work.flops,
        gb_s=work.bytes / timing.median_ms / 1e6,
        tflop_s=work.flops / timing.median_ms / 1e9,
        floor_ms=lab.ceilings.floor_ms([work]),
        sqnr_db=sqnr_db,
    )


class Operands:
    """The operands of one problem's GEMMs, each made when it is first needed."""

    def __init__(self, problem: OpProblem) -> None:
        self.a, self.w, self.dout = problem.a.detach(), problem.w.detach(), problem.dout
        self.groups = TokenGroups.from_offs(problem.offs, problem.shape.m)
        self._tokens: dict[tuple[str, TokenLayout, int], TokenOperand] = {}

    @cached_property
    def a_rows(self) -> RowOperand:
        return quantize_rows(self.a, self.groups, ScaleFormat.FP32)

    @cached_property
    def a_rows_pow2(self) -> RowOperand:
        return quantize_rows(self.a, self.groups, ScaleFormat.POW2)

    @cached_property
    def dout_rows(self) -> RowOperand:
        return quantize_rows(self.dout, self.groups, ScaleFormat.FP32)

    @cached_property
    def forward_weight(self) -> WeightOperand:
        return quantize_weight_for_forward(self.w, ScaleFormat.FP32)

    @cached_property
    def dgrad_weight(self) -> WeightOperand:
        return quantize_weight_for_dgrad(self.w, ScaleFormat.FP32)

    def a_tokens(self, layout: TokenLayout, token_tile: int = BLOCK) -> TokenOperand:
        return self._token_operand("a", self.a, layout, token_tile)

    def dout_tokens(self, layout: TokenLayout) -> TokenOperand:
        return self._token_operand("dout", self.dout, layout, BLOCK)

    def _token_operand(self, name: str, x: Tensor, layout: TokenLayout, token_tile: int) -> TokenOperand:
        key = name, layout, token_tile
        if key not in self._tokens:
            self._tokens[key] = quantize_tokens(x, self.groups, ScaleFormat.FP32, layout, token_tile)
        return self._tokens[key]


def kernels(problem: OpProblem, expected: Products, preferences: Iterable[KernelPreference]) -> list[Kernel]:
    """Every quantization, every GEMM in BF16, and those that the backends of `preferences` can compute."""
    operands, sizes = Operands(problem), problem.sizes
    found = [*_plan(problem, sizes, operands), *_rows(sizes, operands)]
    found += [*_each_weight(sizes, operands), *_both_weights(sizes, operands)]
    for layout in token_layouts(preferences):
        found += _tokens(sizes, operands, layout)
    found += _outputs(problem, sizes, operands)
    found += _bf16_gemms(problem, sizes, operands, expected)
    return [*found, *_gemms(problem, operands, expected, preferences)]


def product_kernels(problem: OpProblem, expected: Products, preferences: Iterable[KernelPreference]) -> list[Kernel]:
    """The weight's quantizations, one operand at a time, and every GEMM that the backends of `preferences` can run."""
    operands = Operands(problem)
    return [*_each_weight(problem.sizes, operands), *_gemms(problem, operands, expected, preferences)]


def backends_of(preferences: Iterable[KernelPreference]) -> dict[KernelPreference, GroupedGemm]:
    """The backends of these preferences, in the order of `BACKENDS`."""
    asked_for = set(preferences)
    return {preference: backend for preference, backend in BACKENDS.items() if preference in asked_for}


def token_layouts(preferences: Iterable[KernelPreference]) -> list[TokenLayout]:
    """The layouts that these backends take; one if there are no backends."""
    layouts = dict.fromkeys(backend.token_layout for backend in backends_of(preferences).values())
    return list(layouts) or [TokenLayout.SIDE_BY_SIDE]


def _plan(problem: OpProblem, s: Sizes, operands: Operands) -> Iterator[Kernel]:
    def checks(groups: TokenGroups) -> Iterator[Check]:
        rows = torch.arange(s.m, device=groups.token_row.device)
        yield "row_source[token_row]", groups.row_source[groups.token_row].float()[:, None], rows.float()[:, None]

    yield Kernel(
        "TokenGroups.from_offs",
        floor.plan_groups(s),
        lambda: TokenGroups.from_offs(problem.offs, s.m),
        checks,
    )
    yield Kernel(
        "ends_within",
        floor.Work(floor.INDEX_BYTES * 2 * s.e),
        lambda: ends_within(problem.offs, s.m),
        lambda ends: [("ends", ends.float()[:, None], problem.offs.float()[:, None])],
    )


def _rows(s: Sizes, o: Operands) -> Iterator[Kernel]:
    yield Kernel(
        "quantize_rows",
        floor.quantize_activation(s, s.k, operands=1),
        lambda: quantize_rows(o.a, o.groups, ScaleFormat.FP32),
        lambda rows: [row_check(rows, o.groups, o.a)],
    )


def _tokens(s: Sizes, o: Operands, layout: TokenLayout) -> Iterator[Kernel]:
    yield Kernel(
        f"quantize_tokens, {layout.value}",
        floor.quantize_activation(s, s.k, operands=1),
        lambda: quantize_tokens(o.a, o.groups, ScaleFormat.FP32, layout),
        lambda tokens: [token_check(tokens, o.groups, o.a)],
    )
    for token_tile in TOKEN_TILES:
        yield Kernel(
            f"quantize_rows_and_tokens, {layout.value}{of_tiles(token_tile)}",
            floor.quantize_activation(s, s.k, operands=2),
            partial(quantize_rows_and_tokens, o.a, o.groups, ScaleFormat.FP32, layout, token_tile),
            lambda both: [row_check(both[0], o.groups, o.a), token_check(both[1], o.groups, o.a)],
        )
    yield Kernel(
        f"requantize_rows_to_tokens, {layout.value}",
        floor.requantize(s, s.k),
        lambda: requantize_rows_to_tokens(o.a_rows_pow2, o.groups, layout),
        lambda tokens: [token_check(tokens, o.groups, o.a)],
    )


def _each_weight(s: Sizes, o: Operands) -> Iterator[Kernel]:
    yield Kernel(
        "quantize_weight_for_forward",
        floor.quantize_weight(s, operands=1),
        lambda: quantize_weight_for_forward(o.w, ScaleFormat.FP32),
        lambda weight: [_weight_check(weight, o.w)],
    )
    yield Kernel(
        "quantize_weight_for_dgrad",
        floor.quantize_weight(s, operands=1),
        lambda: quantize_weight_for_dgrad(o.w, ScaleFormat.FP32),
        lambda weight: [_weight_check(weight, o.w.transpose(1, 2))],
    )


def _both_weights(s: Sizes, o: Operands) -> Iterator[Kernel]:
    yield Kernel(
        "quantize_weight",
        floor.quantize_weight(s, operands=2),
        lambda: quantize_weight(o.w, ScaleFormat.FP32),
        lambda both: [_weight_check(both[0], o.w), _weight_check(both[1], o.w.transpose(1, 2))],
    )


def _outputs(problem: OpProblem, s: Sizes, o: Operands) -> Iterator[Kernel]:
    dtype, device = o.a.dtype, o.a.device
    padded = reference.gather_padded_rows(problem.dout, o.groups).to(dtype)
    yield Kernel(
        "unpad",
        floor.unpad(s, s.n),
        lambda: unpad(padded, o.groups, torch.empty(s.m, s.n, dtype=dtype, device=device)),
        lambda out: [("rows", out, o.dout)],
    )
    # Here every row is used: what it costs to find that out.
    yield Kernel(
        "zero_unused_rows_",
        floor.Work(floor.INDEX_BYTES),
        lambda: zero_unused_rows_(padded[: s.m], problem.offs),
        lambda out: [("rows", out, padded[: s.m])],
    )


def _bf16_gemms(problem: OpProblem, s: Sizes, o: Operands, expected: Products) -> Iterator[Kernel]:
    a, w, dout = o.a.bfloat16(), o.w.bfloat16(), o.dout.bfloat16()
    products: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "forward": (lambda: F.grouped_mm(a, w.transpose(1, 2), offs=problem.offs), expected["out"]),
        "dgrad": (lambda: F.grouped_mm(dout, w, offs=problem.offs), expected["da"]),
        "wgrad": (lambda: F.grouped_mm(dout.t(), a, offs=problem.offs), expected["dw"]),
    }
    for name, (run, product) in products.items():
        yield Kernel(f"BF16 {name}", floor.bf16_gemm(s), run, _product_check(name, product), is_ours=False)


def _gemms(
    problem: OpProblem, operands: Operands, expected: Products, preferences: Iterable[KernelPreference]
) -> Iterator[Kernel]:
    for preference, backend in backends_of(preferences).items():
        device = problem.a.device
        gemms = _gemms_of(preference.value, backend, problem.sizes, operands, expected)
        yield from (kernel for gemm, kernel in gemms.items() if not backend.missing(gemm, device))
        # The others compute no otherwise with longer tiles.
        if preference is KernelPreference.TRITON and not backend.missing(Gemm.WGRAD, device):
            for token_tile in TOKEN_TILES[1:]:
                yield _wgrad(preference.value, backend, problem.sizes, operands, expected, token_tile)


def _gemms_of(name: str, backend: GroupedGemm, s: Sizes, o: Operands, expected: Products) -> dict[Gemm, Kernel]:
    dtype = o.a.dtype
    return {
        Gemm.FORWARD: Kernel(
            f"{name} forward",
            floor.forward_gemm(s),
            lambda: backend.m_grouped(o.a_rows, o.forward_weight, o.groups, dtype),
            _product_check("out", expected["out"]),
        ),
        Gemm.DGRAD: Kernel(
            f"{name} dgrad",
            floor.dgrad_gemm(s),
            lambda: backend.m_grouped(o.dout_rows, o.dgrad_weight, o.groups, dtype),
            _product_check("da", expected["da"]),
        ),
        Gemm.WGRAD: _wgrad(name, backend, s, o, expected, BLOCK),
    }


def _wgrad(name: str, backend: GroupedGemm, s: Sizes, o: Operands, expected: Products, token_tile: int) -> Kernel:
    layout, dtype = backend.token_layout, o.a.dtype
    return Kernel(
        f"{name} wgrad{of_tiles(token_tile)}",
        floor.wgrad_gemm(s),
        lambda: backend.k_grouped(o.dout_tokens(layout), o.a_tokens(layout, token_tile), o.groups, dtype),
        _product_check("dw", expected["dw"]),
    )


def of_tiles(token_tile: int) -> str:
    """What the name of a row with such token tiles ends in."""
    return "" if token_tile == BLOCK else f", tiles of {token_tile}"


def _product_check(name: str, expected: Tensor) -> Callable[[Tensor], list[Check]]:
    return lambda product: [(name, product.to(expected.dtype), expected)]


def row_check(rows: RowOperand, groups: TokenGroups, x: Tensor) -> Check:
    """A row operand must hold `x` `(M, K)`."""
    return "rows", reference.dequantize_rows(rows)[groups.token_row], x.float()


def token_check(tokens: TokenOperand, groups: TokenGroups, x: Tensor, name: str = "tokens") -> Check:
    """A token operand must hold `x` `(M, K)`, transposed."""
    return name, reference.dequantize_tokens(tokens, groups)[:, groups.token_row].t(), x.float()


def _weight_check(weight: WeightOperand, w: Tensor) -> Check:
    return "weight", reference.dequantize_weight(weight), w.float()
