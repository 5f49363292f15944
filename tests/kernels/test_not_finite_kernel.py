"""Where results are not finite is noted as the definition says, once, and nothing else is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.not_finite import launch_note_not_finite
from fp8moe.rows.not_finite import note_by_torch
from tests.generators import FLOAT_DTYPES

NOW = 5 * 2**32 + 7
BAD = (float("nan"), float("inf"), float("-inf"))

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :],
    "rows of a longer one": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


def noted(
    x: Tensor, y: Tensor | None, every: int | tuple[int, int], known: tuple[int, int] = (0, 0)
) -> list[int]:  # fmt: skip
    """What both make of it, which must be equal. `every` is that of `x` and `y`, or of each."""
    x_every, y_every = (every, every) if isinstance(every, int) else every
    found = []
    for note in (launch_note_not_finite, note_by_torch):
        first = torch.tensor([*known, -1], device=x.device)
        note(x, x_every, y, y_every, first, NOW)
        assert first[2] == -1
        found.append(first[:2].tolist())
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize(("num_columns", "every"), [(1, 128), (256, 128), (1000, 128), (9, 1)])
def test_the_first_and_the_last_row_and_column(
    device: torch.device, num_rows: int, num_columns: int, every: int, dtype: torch.dtype
) -> None:
    last = num_rows - 1, (num_columns - 1) // every * every
    for place, value in zip(((0, 0), last), BAD, strict=False):
        bad, good = torch.randn(2, num_rows, num_columns, device=device).to(dtype)
        bad[place] = value
        assert noted(bad, None, every) == [NOW, 0]
        assert noted(bad, good.float(), every) == [NOW, 0]
        assert noted(good, bad, every) == [0, NOW]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_are_not_contiguous(device: torch.device, layout: str) -> None:
    for every, value in zip((128, 1, 128), BAD, strict=True):
        bad, good = torch.randn(2, 40, 300, device=device)
        bad[33, 256] = value
        assert noted(LAYOUTS[layout](bad), good, every) == [NOW, 0]
        assert noted(bad, LAYOUTS[layout](bad), every) == [NOW, NOW]


def test_more_columns_than_a_tile(device: torch.device) -> None:
    x = torch.zeros(3, 4200, device=device)
    x[2, 4199] = torch.nan
    assert noted(x, x, 1) == [NOW, NOW]
    assert noted(x, None, 128) == [0, 0]
    assert noted(x[:, ::3], None, 1) == [0, 0]


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize("num_columns", [9, 300, 4200])
def test_each_of_two_has_columns_of_its_own(device: torch.device, num_rows: int, num_columns: int) -> None:
    """Of one all, of the other one of 128: the last row and an odd column between."""
    bad, good = torch.zeros(2, num_rows, num_columns, dtype=torch.bfloat16, device=device)
    bad[-1, 5] = torch.nan
    assert noted(bad, bad, (1, 128)) == [NOW, 0]
    assert noted(bad, bad, (128, 1)) == [0, NOW]
    bad[-1, 0] = torch.nan
    assert noted(good, bad, (1, 128)) == [0, NOW]
    assert noted(bad, good, (128, 1)) == [NOW, 0]


def test_finite_values_however_large_and_columns_between_are_not_noted(device: torch.device) -> None:
    x = torch.full((129, 300), torch.finfo(torch.float32).max, device=device)
    x[:, 1:128] = torch.nan
    assert noted(x, x, 128) == [0, 0]
    assert noted(x, None, 1) == [NOW, 0]


def test_the_first_time_is_kept(device: torch.device) -> None:
    x = torch.full((300, 256), torch.nan, device=device)
    assert noted(x, x, 128, (3, 0)) == [3, NOW]
    assert noted(x, x, 128, (0, 4)) == [NOW, 4]


def test_nothing_to_look_at(device: torch.device) -> None:
    for shape in ((0, 256), (3, 0)):
        x = torch.empty(shape, device=device)
        assert noted(x, x, 128) == noted(x, None, 1) == [0, 0]


@pytest.mark.gpu
@pytest.mark.large
def test_more_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    x = torch.zeros(2**22, 1024, dtype=torch.bfloat16, device="cuda")
    first = torch.zeros(2, dtype=torch.int64, device="cuda")
    one_column = x.view(-1, 1)
    x[-1, 895] = torch.inf
    launch_note_not_finite(x, 128, x, 128, first, NOW)
    assert first.tolist() == [0, 0]
    launch_note_not_finite(one_column, 1, one_column, 1, first, NOW)
    assert first.tolist() == [NOW, NOW]
    x[-1, 896] = torch.inf
    launch_note_not_finite(x, 128, x, 128, first.zero_(), NOW)
    assert first.tolist() == [NOW, NOW]
