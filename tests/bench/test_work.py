"""Bytes and floors against numbers worked out by hand."""

from collections.abc import Sequence

import pytest
import torch

from fp8moe.bench import ceilings as ceilings_module
from fp8moe.bench.ceilings import Ceilings, Moved, measure_ceilings, moved_bytes
from fp8moe.bench.kernels import Kernel
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import draw_topk
from fp8moe.bench.timing import HostStopwatch
from fp8moe.bench.variants import bf16_op
from fp8moe.config import KernelPreference, ScaleFormat
from fp8moe.operands import TokenLayout
from fp8moe.quantize import quantize_rows_and_tokens, quantize_weight_for_forward
from fp8moe.rows.groups import plan_groups
from fp8moe.rows.routing import Routing
from tests.bench.support import BUDGET, LAYER_SHAPE, SHAPE, small_layer, small_problem
from tests.generators import offsets

# 100 and 200 rows pad to 128 + 256 = 384; any routing of 300 rows to 2 groups fits into 512.
GROUP_SIZES = [100, 200]


def test_operands_count_the_rows_in_use() -> None:
    groups = plan_groups(offsets(GROUP_SIZES), 300)
    x, w = torch.randn(300, 256), torch.randn(2, 256, 128)
    operands = quantize_rows_and_tokens(x, groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE)
    weight = quantize_weight_for_forward(w, ScaleFormat.FP32)
    # codes, and a scale for 128 of them
    assert moved_bytes(operands, GROUP_SIZES) == 2 * (384 * 256 + 384 * 256 // 128 * 4)
    assert moved_bytes([x], GROUP_SIZES) == 300 * 256 * 4
    assert moved_bytes([weight], GROUP_SIZES) == 2 * 256 * 128 + 2 * 2 * 1 * 4
    # ends 2 + 2, maps of padded rows 512 + 512, map of rows 300; 4 bytes each
    assert moved_bytes([groups], GROUP_SIZES) == 4 * (2 + 2 + 512 + 512 + 300)
    routing = Routing.from_topk(draw_topk(LAYER_SHAPE, LAYER.balances[0], seed=0)[0], LAYER_SHAPE["E"])
    assert moved_bytes([routing], GROUP_SIZES) == sum(tensor.nbytes for tensor in routing.tensors)


def operand(features: int) -> int:
    """Bytes of a problem's row or token operand: groups of 121, 0 and 79 rows."""
    return 2 * 128 * features + 2 * 128 * features // 128 * 4


@pytest.mark.parametrize(
    ("name", "num_bytes", "flops"),
    [
        ("quantize_rows_and_tokens, side by side", 200 * 128 * 2 + 2 * operand(128), 0),
        ("quantize_weight_for_dgrad", 3 * 256 * 128 * (2 + 1) + 3 * 2 * 4, 0),
        ("quantize_weight_into", 3 * 256 * 128 * (2 + 1 + 1) + 3 * 2 * 4, 0),
        ("transpose_codes", 2 * 3 * 256 * 128, 0),
        ("WeightCache, unchanged", 3 * 256 * 128 * 2 // 256, 0),
        ("WeightCache, changed", 3 * 256 * 128 * (2 + 1 + 1) + 3 * 2 * 4, 0),
        ("unpad", 2 * 200 * 256 * 2, 0),
        ("BF16 wgrad", 2 * (200 * 128 + 200 * 256 + 3 * 256 * 128), 2 * 200 * 256 * 128),
        ("emulated forward", operand(128) + 3 * 256 * 128 + 3 * 2 * 4 + 200 * 256 * 2, 2 * 200 * 256 * 128),
        ("emulated dgrad", operand(256) + 3 * 256 * 128 + 3 * 2 * 4 + 200 * 128 * 2, 2 * 200 * 256 * 128),
        ("emulated wgrad", operand(256) + operand(128) + 3 * 256 * 128 * 2, 2 * 200 * 256 * 128),
    ],
)
def test_bytes_and_flops_of_a_products_kernels(name: str, num_bytes: int, flops: int) -> None:
    problem = small_problem()
    kernels = PRODUCT.kernels(SHAPE, problem, problem.products(bf16_op), {KernelPreference.EMULATED})
    kernel = next(kernel for kernel in kernels if kernel.name == name)
    assert moved_bytes(moved_by(kernel), problem.group_sizes) == num_bytes
    assert kernel.flops == flops


def test_bytes_of_a_layers_kernels() -> None:
    problem = small_layer()
    t, k, h, i, _ = LAYER_SHAPE.sizes
    padded = sum(-(-size // 128) * 128 for size in problem.group_sizes)
    expected = {
        "quantize_swiglu": t * k * 2 * i * 2 + padded * i * (1 + 4 / 128),
        "quantize_swiglu_backward, side by side": t * k * 3 * i * 2 + padded * 5 * i * (1 + 4 / 128),
        "quantize_and_spread_rows": t * h * 2 + padded * h * (1 + 4 / 128),
        "quantize_tokens, gathering, side by side": t * h * 2 + padded * h * (1 + 4 / 128),
        "quantize_rows_and_tokens, gathering, side by side": t * h * 2 + 2 * padded * h * (1 + 4 / 128),
        "quantize_swiglu_forward, FP8 storage": t * k * 2 * i * 2 + padded * 3 * i * (1 + 4 / 128),
        "quantize_swiglu_backward, side by side, FP8 storage": t * k * i * 2 + padded * 7 * i * (1 + 4 / 128),
        "spread_messages": t * (h + 32) + padded * h * (1 + 4 / 128),
        "requantize_messages, side by side": t * (h + 32) + padded * h * (1 + 4 / 128),
        "combine": t * k * h * 2 + t * h * 2,
        "note_not_finite, two": t * h * 2 + t * (h // 128) * 32 + 2 * 8,
    }
    for kernel in LAYER.kernels(LAYER_SHAPE, problem, {}, {KernelPreference.EMULATED}):
        if kernel.name in expected:
            assert moved_bytes(moved_by(kernel), problem.group_sizes) == expected.pop(kernel.name)
    assert not expected


def moved_by(kernel: Kernel) -> Sequence[Moved]:
    return list(kernel.moves(kernel.run()))


def test_a_floor_is_the_longer_of_moving_and_multiplying() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=2)
    assert ceilings.floor_ms(2_000_000, 0, in_bf16=False) == pytest.approx(2e-3)
    assert ceilings.floor_ms(1_000_000, 6_000_000, in_bf16=False) == pytest.approx(3e-3)
    assert ceilings.floor_ms(1_000_000, 6_000_000, in_bf16=True) == pytest.approx(6e-3)
    assert ceilings.floor_ms(7_000_000, 6_000_000, in_bf16=True) == pytest.approx(7e-3)


def test_no_floor_without_a_rate() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=None)
    assert ceilings.floor_ms(1, 1, in_bf16=False) is None
    assert ceilings.floor_ms(1_000_000, 0, in_bf16=False) == pytest.approx(1e-3)


def test_ceilings_are_bytes_and_flops_over_the_time_of_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    monkeypatch.setattr(ceilings_module, "CEILINGS_BUDGET", BUDGET)
    ceilings = measure_ceilings(torch.device("cpu"), HostStopwatch(clock=clock))
    assert ceilings.copy_gb_s == pytest.approx(2 * 4 * 2**22 / 1e-3 / 1e9)
    assert ceilings.bf16_tflop_s == pytest.approx(2 * 256**3 / 1e-3 / 1e12)
    assert ceilings.fp8_tflop_s is None
