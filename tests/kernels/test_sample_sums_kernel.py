"""The kernel's sums equal those of the definition: numbers exactly, sums of squares but for the order of adding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe import ScaleFormat
from fp8moe.kernels.sample_sums import launch_sample_sums
from fp8moe.quantize import sample_sums
from tests.generators import FLOAT_DTYPES, VALUE_KINDS, values

KINDS = ("by_row", "by_token", "by_block")


def both(
    x: Tensor, source: Tensor | None, blocks: tuple[int, ...], scale_format: ScaleFormat, kinds: tuple[str, ...] = KINDS
) -> dict[str, list[float]]:  # fmt: skip
    """The sums by kind of tile, added to what was there; checked against the definition."""
    begun = [3.0, 2.0, 1.0, 4.0, 0.5, 0.25, 1e-30]
    made: dict[str, Any] = {kind: torch.tensor(begun, dtype=torch.float64, device=x.device) for kind in kinds}
    right = {kind: sums.cpu().clone() for kind, sums in made.items()}
    nothing = dict.fromkeys(KINDS)
    pow2 = scale_format is ScaleFormat.POW2
    launch_sample_sums(x, source, blocks, **nothing | made, pow2=pow2)
    on_host = None if source is None else source.cpu()
    sample_sums.add_by_torch(x.cpu(), on_host, blocks, scale_format, **nothing | right)
    for kind in kinds:
        assert made[kind][:4].tolist() == right[kind][:4].tolist(), kind
        torch.testing.assert_close(made[kind][4:].cpu(), right[kind][4:], rtol=1e-9, atol=0, equal_nan=True)
    return {kind: sums.tolist() for kind, sums in made.items()}


@pytest.mark.parametrize("scale_format", ScaleFormat)
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.bfloat16) for kind in VALUE_KINDS), *(("outliers", x) for x in FLOAT_DTYPES)]
)
def test_rows_that_are_chosen(
    device: torch.device, kind: str, dtype: torch.dtype, scale_format: ScaleFormat
) -> None:  # fmt: skip
    x = values(kind, (150, 136), dtype, 3).to(device)
    source = torch.randint(-1, 150, (128,), device=device)
    source[100:] = -1
    both(x, source, (), scale_format)


def test_several_blocks_of_rows_in_any_order(device: torch.device) -> None:
    x = values("normal", (150, 300), torch.bfloat16, 3).to(device)
    both(x[:, 100:], torch.randint(-1, 150, (384,), device=device), (), ScaleFormat.FP32, ("by_row", "by_token"))
    both(x.t().contiguous().t(), torch.randint(-1, 150, (128,), device=device), (), ScaleFormat.FP32, ("by_token",))


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize("num_features", [1, 128, 129])
def test_blocks_of_rows(device: torch.device, num_rows: int, num_features: int) -> None:
    x = values("normal", (num_rows, num_features), torch.float32, 0).to(device)
    blocks = tuple(range(-(-num_rows // 128)))
    sums = both(x, None, blocks, ScaleFormat.FP32)
    assert [of[0] for of in sums.values()] == [3 + int((x != 0).sum())] * 3
    both(x, None, (blocks[-1],), ScaleFormat.POW2, ("by_row",))


@pytest.mark.parametrize("n", [96, 128, 200])
def test_blocks_of_matrices(device: torch.device, n: int) -> None:
    x = values("outliers", (3, n, 136), torch.bfloat16, 0).to(device)
    of_matrix = -(-n // 128)
    for stored in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        both(stored, None, (0, of_matrix, 2 * of_matrix, 3 * of_matrix - 1), ScaleFormat.FP32, ("by_block",))
        both(stored, None, (of_matrix,), ScaleFormat.POW2, ("by_block", "by_row"))


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_what_is_not_finite(device: torch.device, scale_format: ScaleFormat) -> None:
    x = torch.randn(128, 256, device=device)
    x[3, 5], x[4, 200], x[5, 7] = torch.nan, torch.inf, -torch.inf
    sums = both(x, None, (0,), scale_format)
    assert [of[3] for of in sums.values()] == [4 + 3] * 3
    assert all(torch.tensor(of).isfinite().all() for of in sums.values())
    both(torch.full_like(x, torch.nan), None, (0,), scale_format)


def test_more_blocks_than_a_launch_takes(device: torch.device) -> None:
    x, sums = torch.ones(640, 128, device=device), torch.zeros(7, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="at most 4"):
        sample_sums.add_sample_sums(x, None, range(5), ScaleFormat.FP32, by_row=sums)
    with pytest.raises(ValueError, match="unpack"):
        launch_sample_sums(x, None, range(5), sums, None, None, pow2=False)
    assert not sums.any()
    sample_sums.add_sample_sums(x, None, range(4), ScaleFormat.FP32, by_row=sums)
    assert sums[0] == 4 * 128 * 128


def test_zeros_and_nothing(device: torch.device) -> None:
    both(torch.zeros(128, 128, device=device), None, (0,), ScaleFormat.FP32)
    both(torch.zeros(128, 0, device=device), None, (0,), ScaleFormat.FP32)
    both(torch.zeros(0, 128, device=device), None, (), ScaleFormat.FP32)
    both(torch.zeros(2, 128, device=device), torch.full((128,), -1, device=device), (), ScaleFormat.POW2)


@pytest.mark.gpu
@pytest.mark.large
def test_more_elements_than_int32() -> None:
    x = torch.zeros(3, 2**20, 1024, dtype=torch.bfloat16, device="cuda")
    x[2, -128:] = torch.randn(128, 1024, device="cuda", dtype=torch.bfloat16)
    sums = torch.zeros(2, 7, dtype=torch.float64, device="cuda")
    launch_sample_sums(x, None, (3 * 2**13 - 1,), sums[0], None, None, pow2=False)
    source = torch.arange(3 * 2**20 - 128, 3 * 2**20, device="cuda")
    launch_sample_sums(x.flatten(0, 1), source, (), sums[1], None, None, pow2=False)
    right = sample_sums.sums_of(sample_sums.row_tiles(x[2, -128:].float()[None]), ScaleFormat.FP32)
    assert right[0] > 0
    for made in sums:
        torch.testing.assert_close(made, right, rtol=1e-9, atol=0)
