"""Wrong results are told from quantized ones."""

import pytest
import torch

from fp8moe.bench.guard import EXACT_DB, WrongResultError, check, poison_freed_memory

EXPECTED = torch.randn(4, 300, 64, generator=torch.Generator().manual_seed(1))


def test_equality_is_a_number() -> None:
    assert check("out", EXPECTED.clone(), EXPECTED) == EXACT_DB


def test_noise_is_measured() -> None:
    noise = torch.randn(EXPECTED.shape, generator=torch.Generator().manual_seed(2))
    assert check("out", EXPECTED + 0.05 * noise, EXPECTED) == pytest.approx(26.0, abs=0.2)  # 20 log10(20)


def test_limits_are_for_the_whole() -> None:
    noise = torch.randn(EXPECTED.shape, generator=torch.Generator().manual_seed(2))
    noisy = EXPECTED + 0.05 * noise
    assert check("out", noisy, EXPECTED, min_sqnr_db=25) > 25
    with pytest.raises(WrongResultError, match=r"dw is wrong: SQNR 26\.\d dB, .* at least 27 and 10 dB"):
        check("dw", noisy, EXPECTED, min_sqnr_db=27)


def test_rows_of_zeros_must_be_zeros() -> None:
    expected = EXPECTED.clone()
    expected[2] = 0
    assert check("dw", expected.clone(), expected) == EXACT_DB
    almost = expected.clone()
    almost[2, 0, 0] = 1e-3
    with pytest.raises(WrongResultError, match=r"dw is wrong: SQNR .* dB, worst row -inf dB"):
        check("dw", almost, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(torch.zeros_like(EXPECTED), id="zeros"),
        pytest.param(EXPECTED * torch.nan, id="NaN"),
        pytest.param(-EXPECTED, id="sign"),
        pytest.param(EXPECTED.flip(0), id="other expert"),
        pytest.param(EXPECTED.index_fill(1, torch.tensor([7]), 0.0), id="one row not written"),
    ],
)
def test_wrong_results_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(WrongResultError, match=r"dw is wrong: SQNR .* dB, worst row .* dB"):
        check("dw", wrong, EXPECTED)


def test_shape_and_dtype_must_be_right() -> None:
    with pytest.raises(WrongResultError, match=r"out is torch.float64 .*; it must be torch.float32"):
        check("out", EXPECTED.double(), EXPECTED)
    with pytest.raises(WrongResultError, match=r"out is torch.float32 \(4, 300\)"):
        check("out", EXPECTED[:, :, 0], EXPECTED)


def test_freed_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    full_like = torch.full_like

    def remember(tensor: torch.Tensor, value: float) -> torch.Tensor:
        made.append(full_like(tensor, value))
        return made[-1]

    monkeypatch.setattr(torch, "full_like", remember)
    poison_freed_memory([EXPECTED, EXPECTED[0]])
    assert [tensor.shape for tensor in made] == [EXPECTED.shape, EXPECTED[0].shape]
    assert all(tensor.isnan().all() for tensor in made)
