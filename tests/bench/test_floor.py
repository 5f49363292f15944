"""Bytes, flops and floors against numbers worked out by hand, and against the tensors themselves."""

import pytest
import torch
from fp8moe.groups import TokenGroups

from fp8moe.bench import floor
from fp8moe.bench.floor import Ceilings, Sizes, Work
from fp8moe.bench.shapes import Shape
from fp8moe.bench.timing import Budget, HostStopwatch
from fp8moe.config import ScaleFormat
from fp8moe.operands import TokenLayout
from fp8moe.quantize import quantize_rows_and_tokens, quantize_weight
from tests.generators import offsets

# 100 and 200 rows pad to 128 + 256 = 384; any routing of 300 rows to 2 groups fits into 512.
SIZES = Sizes.of(Shape(300, 256, 128, 2), [100, 200], torch.bfloat16)


def test_rows_in_use_and_capacity() -> None:
    assert (SIZES.m, SIZES.r, SIZES.capacity) == (300, 384, 512)
    assert Sizes.of(Shape(129, 128, 128, 3), [0, 129, 0], torch.float32).r == 256


@pytest.mark.parametrize(
    ("work", "num_bytes", "flops"),
    [
        # offs 2; out: ends 2 + 2, maps of padded rows 512 + 512, map of rows 300; 4 bytes each
        (floor.plan_groups(SIZES), 4 * (2 + 4 + 1024 + 300), 0),
        # (300, 128) bf16 in; (384, 128) codes and 384 scales out
        (floor.quantize_activation(SIZES, 128, operands=1), 76_800 + 49_152 + 1_536, 0),
        (floor.quantize_activation(SIZES, 256, operands=2), 153_600 + 2 * (98_304 + 3_072), 0),
        (floor.requantize(SIZES, 128), 2 * (49_152 + 1_536), 0),
        # (2, 256, 128) bf16 in; codes once or twice, 2 * 2 * 1 scales out
        (floor.quantize_weight(SIZES, operands=1), 131_072 + 65_536 + 16, 0),
        (floor.quantize_weight(SIZES, operands=2), 131_072 + 2 * 65_536 + 16, 0),
        # 2 * 300 * 256 * 128 operations each
        (floor.forward_gemm(SIZES), 50_688 + 65_552 + 153_600, 19_660_800),
        (floor.dgrad_gemm(SIZES), 101_376 + 65_552 + 76_800, 19_660_800),
        (floor.wgrad_gemm(SIZES), 101_376 + 50_688 + 131_072, 19_660_800),
        (floor.bf16_gemm(SIZES), 2 * (38_400 + 76_800 + 65_536), 19_660_800),
    ],
)
def test_work_by_hand(work: Work, num_bytes: int, flops: int) -> None:
    assert (work.bytes, work.flops) == (num_bytes, flops)


def test_work_equals_the_tensors_where_nothing_is_padded() -> None:
    """One group of 256 rows: rows, rows in use and capacity are the same."""
    sizes = Sizes.of(Shape(256, 256, 384, 1), [256], torch.float32)
    x, w = torch.randn(256, 384), torch.randn(1, 256, 384)
    offs = offsets([256])
    groups = TokenGroups.from_offs(offs, 256)
    rows, tokens = quantize_rows_and_tokens(x, groups, ScaleFormat.FP32, TokenLayout.PER_EXPERT)
    forward, dgrad = quantize_weight(w, ScaleFormat.FP32)
    operands = rows.data.nbytes + rows.scale.nbytes + tokens.data.nbytes + tokens.scale.nbytes
    assert floor.quantize_activation(sizes, 384, operands=2).bytes == x.nbytes + operands
    assert floor.quantize_weight(sizes, operands=2).bytes == (
        w.nbytes + forward.data.nbytes + dgrad.data.nbytes + forward.scale.nbytes
    )
    assert floor.plan_groups(sizes).bytes == offs.nbytes + sum(tensor.nbytes for tensor in groups.tensors)


def test_a_floor_is_the_longer_of_moving_and_multiplying() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=2)
    moving = Work(bytes=2_000_000)  # 2 us
    multiplying = Work(bytes=1_000_000, flops=6_000_000)  # 1 us, and 3 us
    multiplying_bf16 = Work(bytes=7_000_000, flops=6_000_000, precision="bf16")  # 7 us, and 6 us
    assert ceilings.floor_ms([moving]) == pytest.approx(2e-3)
    assert ceilings.floor_ms([multiplying]) == pytest.approx(3e-3)
    assert ceilings.floor_ms([multiplying_bf16]) == pytest.approx(7e-3)
    assert ceilings.floor_ms([moving, multiplying, multiplying_bf16]) == pytest.approx(12e-3)


def test_no_floor_without_a_rate() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=None)
    assert ceilings.floor_ms(floor.forward_work(SIZES, "fp8")) is None
    assert ceilings.floor_ms(floor.forward_work(SIZES, "bf16")) == pytest.approx(19_660_800 / 1e12 * 1e3)


def test_a_step_takes_seven_kernels_in_fp8_and_three_gemms_in_bf16() -> None:
    fp8 = floor.forward_work(SIZES, "fp8") + floor.backward_work(SIZES, "fp8")
    bf16 = floor.forward_work(SIZES, "bf16") + floor.backward_work(SIZES, "bf16")
    assert (len(fp8), len(bf16)) == (7, 3)
    assert sum(work.flops for work in fp8) == sum(work.flops for work in bf16) == 3 * 19_660_800


def test_ceilings_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "CEILINGS_BUDGET", Budget(1, min_repeats=2, max_repeats=2))
    ceilings = floor.measure_ceilings(torch.device("cpu"), HostStopwatch())
    assert 0.001 < ceilings.copy_gb_s < 10_000
    assert 1e-5 < ceilings.bf16_tflop_s < 100
    assert ceilings.fp8_tflop_s is None
