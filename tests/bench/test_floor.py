"""The fewest kernels of a step against numbers worked out by hand, and their floor in the report."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.table import Table

from fp8moe.bench.ceilings import Ceilings
from fp8moe.bench.figures import Measurement, Result
from fp8moe.bench.floor import step_floor_ms
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import measure_problem
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.record import Report, environment_of, write_json
from fp8moe.bench.shapes import layer_shape, product_shape
from fp8moe.bench.tables import variant_table
from fp8moe.gemm.explain import explain
from tests.bench.support import CPU, SHAPE, small_lab

# 100 and 200 rows pad to 128 + 256 = 384.
GROUP_SIZES = [100, 200]


def operand(features: int) -> int:
    """Bytes: 384 rows of codes, and of scales."""
    return 384 * features + 384 * features // 128 * 4


def test_the_kernels_of_a_products_step() -> None:
    assert sorted(PRODUCT.step(product_shape(300, 256, 128, 2), GROUP_SIZES)) == sorted([
        (76_800 + 2 * (49_152 + 1_536), 0),  # (300, 128) bf16 in; (384, 128) codes and 384 scales out, twice
        (153_600 + 2 * (98_304 + 3_072), 0),
        (131_072 + 65_536 + 16, 0),  # (2, 256, 128) bf16 in; codes and 2 * 2 * 1 scales out: for forward, for dgrad
        (131_072 + 65_536 + 16, 0),
        (50_688 + 65_552 + 153_600, 19_660_800),  # 2 * 300 * 256 * 128 operations each
        (101_376 + 65_552 + 76_800, 19_660_800),
        (101_376 + 50_688 + 131_072, 19_660_800),
    ])  # fmt: skip


def test_the_kernels_of_a_layers_step() -> None:
    """150 tokens that choose two experts each, H 256, I 128."""
    gate_up, down = 2 * 256 * 256, 2 * 256 * 128  # elements
    flops = 2 * 300 * 256
    assert sorted(LAYER.step(layer_shape(150, 2, 256, 128, 2), GROUP_SIZES)) == sorted([
        *[(150 * 256 * 2 + 2 * operand(256), 0)] * 2,  # quantize tokens, output gradients
        (300 * 256 * 2 + operand(128), 0),  # SwiGLU
        (300 * 128 * 2 + 300 * 256 * 2 + 2 * operand(256) + operand(128), 0),  # its backward
        *[(300 * 256 * 2 + 150 * 256 * 2, 0)] * 2,  # combine
        *[(3 * gate_up + 2 * 2 * 2 * 4, 0)] * 2,
        *[(3 * down + 2 * 2 * 1 * 4, 0)] * 2,
        (operand(256) + gate_up + 32 + 300 * 256 * 2, flops * 256),
        (operand(256) + gate_up + 32 + 300 * 256 * 2, flops * 256),
        (2 * operand(256) + 2 * gate_up, flops * 256),
        (operand(128) + down + 16 + 300 * 256 * 2, flops * 128),
        (operand(256) + down + 16 + 300 * 128 * 2, flops * 128),
        (operand(256) + operand(128) + 2 * down, flops * 128),
    ])  # fmt: skip


def test_the_floor_of_a_step_is_the_sum_over_its_kernels() -> None:
    ceilings = Ceilings(copy_gb_s=1000, bf16_tflop_s=1, fp8_tflop_s=2)
    moving, multiplying = (2_000_000, 0), (1_000_000, 6_000_000)  # 2 us; 1 us, and 3 us
    assert step_floor_ms([moving, multiplying, multiplying], ceilings) == pytest.approx(8e-3)
    assert step_floor_ms([moving, multiplying], replace(ceilings, fp8_tflop_s=None)) is None


@pytest.fixture(scope="module")
def result() -> Result:
    explains = [partial(explain, CPU)]
    return measure_problem(PRODUCT, SHAPE, PRODUCT.balances[0], CPU, explains, None, small_lab())


def shares(table: Table) -> list[object]:
    column = next(column for column in table.columns if column.header == "floor\n/ time")
    return list(column.cells)


def test_the_table_tells_how_close_fp8_comes(result: Result) -> None:
    assert result.floor_ms == step_floor_ms(PRODUCT.step(SHAPE, result.group_sizes), small_lab().ceilings)
    assert result.floor_ms is not None
    _, *rows = result.variants
    fp8 = [row for row in rows if isinstance(row, Measurement)]
    assert len(fp8) == 4
    assert shares(variant_table(result)) == ["-", "-", *(f"{result.floor_ms / row.both.median_ms:.0%}" for row in fp8)]

    takes_bf16 = replace(result, variants=[replace(fp8[0], computed_by="BF16")])
    assert shares(variant_table(takes_bf16)) == ["-", "-"]
    assert shares(variant_table(replace(result, floor_ms=None))) == ["-"] * 6


def test_the_json_has_the_floor(result: Result, tmp_path: Path) -> None:
    report = Report("op", "", "", environment_of(CPU), small_lab().ceilings, [result])
    write_json(report, tmp_path / "bench.json")
    (problem,) = json.loads((tmp_path / "bench.json").read_text())["problems"]
    assert problem["floor_ms"] == result.floor_ms
