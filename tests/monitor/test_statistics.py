"""Each statistic is what its formula says, element by element."""

import math

import pytest
import torch
from torch import Tensor

from fp8moe import ScaleFormat
from fp8moe.monitor import statistics
from fp8moe.operands import BLOCK
from fp8moe.quantize import sample_sums
from fp8moe.rows.groups import plan_groups


def by_hand(tiles: list[list[float]], scale_format: ScaleFormat) -> list[float]:
    """The statistics of tiles of finite numbers, in Python's own arithmetic."""
    values = under = largest = 0
    signal = noise = amax = 0.0
    for tile in tiles:
        top = max(map(abs, tile))
        scale = max(top, 2.0**-100) / 448
        if scale_format is ScaleFormat.POW2:
            scale = 2.0 ** math.ceil(math.log2(scale))
        for x in tile:
            code = nearest_e4m3(x / scale)
            values += x != 0
            under += x != 0 and code == 0
            largest += abs(code) == 448
            signal += x * x
            noise += (x - code * scale) ** 2
        amax = max(amax, top)
    return [under / values, largest / values, 10 * math.log10(signal / noise), amax, 0.0]


def nearest_e4m3(x: float) -> float:
    """3 bits of mantissa, exponents from -6 on, up to 448."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3)
    return math.copysign(min(round(abs(x) / step) * step, 448.0), x)


def measured(tiles: Tensor, scale_format: ScaleFormat) -> Tensor:
    return torch.tensor(statistics.from_sums(sample_sums.sums_of(tiles, scale_format).tolist()))


def of_rows(x: Tensor, scale_format: ScaleFormat) -> Tensor:
    return measured(sample_sums.row_tiles(x[None]), scale_format)


def of_tokens(x: Tensor, scale_format: ScaleFormat) -> Tensor:
    return measured(sample_sums.token_tiles(x.unflatten(0, (-1, BLOCK))), scale_format)


def of_weight(x: Tensor, scale_format: ScaleFormat) -> Tensor:
    return measured(sample_sums.block_tiles(x), scale_format)


def spread(*shape: int) -> Tensor:
    """Numbers of all sizes, some zeros among them."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-24, 4, shape))
    return x.masked_fill(torch.rand(shape) < 0.1, 0.0)


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_statistics_are_those_of_each_tile(scale_format: ScaleFormat) -> None:
    x = spread(256, 200)
    rows = [row[first : first + BLOCK] for row in x.tolist() for first in (0, BLOCK)]
    expected = by_hand(rows, scale_format)
    assert 0.01 < expected[0] < 0.9
    torch.testing.assert_close(of_rows(x, scale_format), torch.tensor(expected), rtol=1e-3, atol=0)
    tokens = [column[first : first + BLOCK] for column in x.t().tolist() for first in (0, BLOCK)]
    expected = by_hand(tokens, scale_format)
    torch.testing.assert_close(of_tokens(x, scale_format), torch.tensor(expected), rtol=1e-3, atol=0)
    bands = x.view(2, BLOCK, 200)
    blocks = [
        band[:, first : first + BLOCK].flatten().tolist() for band in bands for first in (0, BLOCK)
    ]  # fmt: skip
    expected = by_hand(blocks, scale_format)
    torch.testing.assert_close(of_weight(bands, scale_format), torch.tensor(expected), rtol=1e-3, atol=0)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    x = spread(8, 256)
    expected = of_rows(x[:, :128], ScaleFormat.FP32)
    x[:, 128:] = 1
    x[:4, 128] = float("nan")
    x[4:, 129] = float("inf")
    found = of_rows(x, ScaleFormat.FP32)
    values = int((x[:, :128] != 0).sum())
    assert found[4] == pytest.approx(8 / (values + 8 * 128))
    torch.testing.assert_close(found[2], expected[2])
    torch.testing.assert_close(found[3], expected[3])
    torch.testing.assert_close(found[:2] * (values + 1024), expected[:2] * values)


def test_tiny_values_underflow_as_a_whole_and_zeros_do_not() -> None:
    alone = sample_sums.sums_of(torch.full((4, 128), 1e-36), ScaleFormat.FP32)
    assert statistics.from_sums(alone.tolist()) == [1, 0, 0, pytest.approx(1e-36), 0]
    zeros = of_rows(torch.zeros(4, 128), ScaleFormat.FP32)
    assert zeros[[0, 1, 3, 4]].tolist() == [0] * 4
    assert zeros[2].isnan()


def test_what_is_exact_has_150_decibels() -> None:
    found = of_rows(torch.full((1, 128), 448.0), ScaleFormat.FP32)
    assert found.tolist() == [0, 1, pytest.approx(150), 448, 0]


def test_blocks_of_a_sample_lie_evenly_among_those_of_groups() -> None:
    groups = plan_groups(torch.tensor([0, 130, 130, 1000, 1001], dtype=torch.int32), 1010)
    live = int(groups.padded_ends[-1]) // BLOCK
    assert live == 2 + 7 + 1
    for phase in (0.0, 0.3, 0.999):
        rows = statistics.padded_rows_of(groups, phase, 4).view(4, BLOCK)
        assert (rows - rows[:, :1] == torch.arange(BLOCK)).all()
        blocks = (rows[:, 0] // BLOCK).tolist()
        assert blocks == [int((number + phase) / 4 * live) for number in range(4)]
    nowhere = plan_groups(torch.zeros(3, dtype=torch.int32), 300)
    rows = statistics.padded_rows_of(nowhere, 0.5, 4)
    assert (nowhere.row_source[rows] == -1).all()


def test_rows_of_a_sample_lie_evenly_and_are_all_if_they_are_few() -> None:
    assert statistics.rows_of(3, 0.5, 8, torch.device("cpu")).tolist() == [0, 1, 2]
    found = statistics.rows_of(1000, 0.5, 8, torch.device("cpu")).tolist()
    assert found == [int((number + 0.5) / 8 * 1000) for number in range(8)]
