"""Bytes, flops and floors against numbers worked out by hand, and against the tensors themselves."""

from dataclasses import replace

import pytest
import torch

from fp8moe.bench import ceilings as ceilings_module
from fp8moe.bench.ceilings import Ceilings, KernelWork, Precision, Sizes, measure_ceilings
from fp8moe.bench.layer.work import LayerWork
from fp8moe.bench.product import work
from fp8moe.bench.shapes import Balance, draw_topk, layer_shape
from fp8moe.bench.timing import HostStopwatch
from fp8moe.config import ScaleFormat
from fp8moe.operands import TokenLayout
from fp8moe.quantize import quantize_rows_and_tokens, quantize_weight_for_forward
from fp8moe.quantize.swiglu_backward import quantize_swiglu_backward
from fp8moe.quantize.swiglu_forward import quantize_swiglu
from fp8moe.rows.groups import plan_groups
from fp8moe.rows.routing import Routing
from tests.bench.support import BUDGET
from tests.generators import offsets

# 100 and 200 rows pad to 128 + 256 = 384; any routing of 300 rows to 2 groups fits into 512. N 256, K 128.
SIZES = Sizes.of([100, 200], torch.bfloat16)
# The same rows of 150 tokens. H 256, I 128.
LAYER = LayerWork.of(layer_shape(150, 2, 256, 128, 2), [100, 200], torch.bfloat16)


def operand(features: int) -> int:
    """Bytes: 384 rows of codes, and of scales."""
    return 384 * features + 384 * features // 128 * 4


def test_rows_in_use_and_capacity() -> None:
    assert (SIZES.m, SIZES.padded, SIZES.capacity) == (300, 384, 512)
    assert Sizes.of([0, 129, 0], torch.float32).padded == 256


@pytest.mark.parametrize(
    ("found", "num_bytes", "flops"),
    [
        # offs 2; out: ends 2 + 2, maps of padded rows 512 + 512, map of rows 300; 4 bytes each
        (work.plan_groups(SIZES), 4 * (2 + 4 + 1024 + 300), 0),
        # (300, 128) bf16 in; (384, 128) codes and 384 scales out
        (work.quantize_activation(SIZES, 128, operands=1), 76_800 + 49_152 + 1_536, 0),
        (work.quantize_activation(SIZES, 256, operands=2), 153_600 + 2 * (98_304 + 3_072), 0),
        # (2, 256, 128) bf16 in; codes once or twice, 2 * 2 * 1 scales out
        (work.quantize_weight(SIZES, 256, 128, operands=1), 131_072 + 65_536 + 16, 0),
        (work.quantize_weight(SIZES, 256, 128, operands=2), 131_072 + 2 * 65_536 + 16, 0),
        # 2 * 300 * 256 * 128 operations each
        (work.m_grouped(SIZES, 128, 256, 153_600), 50_688 + 65_552 + 153_600, 19_660_800),
        (work.m_grouped(SIZES, 256, 128, 76_800), 101_376 + 65_552 + 76_800, 19_660_800),
        (work.wgrad(SIZES, 256, 128), 101_376 + 50_688 + 131_072, 19_660_800),
        (work.bf16_gemm(SIZES, 256, 128), 2 * (38_400 + 76_800 + 65_536), 19_660_800),
        (LAYER.quantize_tokens, 150 * 256 * 2 + 2 * operand(256), 0),
        (LAYER.swiglu, 300 * 256 * 2 + operand(128), 0),
        (LAYER.swiglu_backward, 300 * 128 * 2 + 300 * 256 * 2 + 2 * operand(256) + operand(128), 0),
        (LAYER.combine, 300 * 256 * 2 + 150 * 256 * 2, 0),
        (LAYER.dequantize_rows, operand(256) + 300 * 256 * 2, 0),
    ],
)
def test_work_by_hand(found: KernelWork, num_bytes: int, flops: int) -> None:
    assert (found.bytes, found.flops) == (num_bytes, flops)


def test_work_equals_the_tensors_where_nothing_is_padded() -> None:
    """One group of 256 rows: rows, rows in use and capacity are the same."""
    sizes = Sizes.of([256], torch.float32)
    x, w = torch.randn(256, 384), torch.randn(1, 256, 384)
    offs = offsets([256])
    groups = plan_groups(offs, 256)
    rows, tokens = quantize_rows_and_tokens(x, groups, ScaleFormat.FP32, TokenLayout.PER_EXPERT)
    weight = quantize_weight_for_forward(w, ScaleFormat.FP32)
    operands = rows.data.nbytes + rows.scale.nbytes + tokens.data.nbytes + tokens.scale.nbytes
    assert work.quantize_activation(sizes, 384, operands=2).bytes == x.nbytes + operands
    assert work.quantize_weight(sizes, 256, 384, operands=1).bytes == (
        w.nbytes + weight.data.nbytes + weight.scale.nbytes
    )
    assert work.plan_groups(sizes).bytes == offs.nbytes + sum(tensor.nbytes for tensor in groups.tensors)


def test_the_layers_work_equals_the_tensors_where_nothing_is_padded() -> None:
    """Every token chooses both experts: 256 rows each, as many as there are padded rows in use."""
    shape = layer_shape(256, 2, 256, 128, 2)
    found = LayerWork.of(shape, [256, 256], torch.float32)
    ids, _ = draw_topk(shape, Balance.UNIFORM, seed=0)
    routing = Routing.from_topk(ids, 2)
    assert found.route.bytes == ids.nbytes + sum(tensor.nbytes for tensor in routing.tensors)

    hidden, x, d_act = torch.randn(256, 256), torch.randn(512, 256).bfloat16(), torch.randn(512, 128).bfloat16()
    layout, groups = TokenLayout.SIDE_BY_SIDE, routing.groups
    used = 512 / groups.capacity  # of what is allocated

    def nbytes(*operands: object) -> float:
        return used * sum(each.data.nbytes + each.scale.nbytes for each in operands)  # type: ignore[attr-defined]

    gathering = replace(groups, row_source=routing.row_token)
    both = quantize_rows_and_tokens(hidden, gathering, ScaleFormat.FP32, layout)
    assert found.quantize_tokens.bytes == hidden.nbytes + nbytes(*both)
    rows, _ = quantize_swiglu(x, groups, ScaleFormat.FP32)
    assert found.swiglu.bytes == x.nbytes + nbytes(rows)
    made = quantize_swiglu_backward(d_act, x, groups, ScaleFormat.FP32, layout=layout)
    operands = nbytes(made.d_x_rows, made.d_x_tokens, made.act_tokens)
    assert found.swiglu_backward.bytes == d_act.nbytes + x.nbytes + operands


@pytest.mark.parametrize(("precision", "kernels", "layer_kernels"), [("fp8", 7, 16), ("bf16", 3, 12)])
def test_a_step_has_three_gemms_a_product(precision: Precision, kernels: int, layer_kernels: int) -> None:
    product, layer = work.step_work(SIZES, 256, 128, precision), LAYER.step(precision)
    assert (len(product), len(layer)) == (kernels, layer_kernels)
    assert [found.flops for found in product if found.flops] == [19_660_800] * 3
    gate_up, down = 2 * 300 * 256 * 256, 2 * 300 * 256 * 128
    assert sorted(found.flops for found in layer if found.flops) == [down] * 3 + [gate_up] * 3
    assert all(found.precision == precision for found in (*product, *layer) if found.flops)


def test_rows_between_kernels_are_bf16_whatever_the_tokens_are() -> None:
    wide = LayerWork.of(layer_shape(150, 2, 256, 128, 2), [100, 200], torch.float32)
    assert wide.swiglu == LAYER.swiglu
    assert wide.combine.bytes == LAYER.combine.bytes + 150 * 256 * 2  # more for tokens in fp32
    grown = {w.bytes - n.bytes for w, n in zip(wide.step("fp8"), LAYER.step("fp8"), strict=True) if w.flops}
    assert grown == {0, 2 * 2 * 256 * 256, 2 * 2 * 256 * 128}  # of the products, only the weights' gradients


def test_a_floor_is_the_longer_of_moving_and_multiplying() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=2)
    moving = KernelWork(bytes=2_000_000)  # 2 us
    multiplying = KernelWork(bytes=1_000_000, flops=6_000_000)  # 1 us, and 3 us
    multiplying_bf16 = KernelWork(bytes=7_000_000, flops=6_000_000, precision="bf16")  # 7 us, and 6 us
    assert ceilings.floor_ms([moving]) == pytest.approx(2e-3)
    assert ceilings.floor_ms([multiplying]) == pytest.approx(3e-3)
    assert ceilings.floor_ms([multiplying_bf16]) == pytest.approx(7e-3)
    assert ceilings.floor_ms([moving, multiplying, multiplying_bf16]) == pytest.approx(12e-3)


def test_no_floor_without_a_rate() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=None)
    assert ceilings.floor_ms(work.step_work(SIZES, 256, 128, "fp8")) is None
    assert ceilings.floor_ms(work.step_work(SIZES, 256, 128, "bf16")) == pytest.approx(3 * 19_660_800 / 1e12 * 1e3)


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
