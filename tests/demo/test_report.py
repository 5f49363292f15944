"""Table and picture of a run."""

import struct
from pathlib import Path

import pytest

from fp8moe.demo.plot import plot_losses
from fp8moe.demo.report import comparison
from fp8moe.demo.settings import Precision
from fp8moe.demo.training import StepRecord


def records(losses: list[float], val_losses: dict[int, float]) -> list[StepRecord]:
    steps: list[StepRecord] = [
        {
            "step": step, "loss": loss, "balance_loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "seconds": 2.0,
            "tokens_per_second": 10.0 + step,
        }
        for step, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    for step, val_loss in val_losses.items():
        steps[step - 1]["val_loss"] = val_loss
    return steps


def rows(curves: dict[Precision, list[StepRecord]]) -> list[tuple[object, ...]]:
    return list(zip(*(column.cells for column in comparison(curves).columns), strict=True))


def test_the_gap_is_relative_to_bf16_over_the_last_tenth() -> None:
    bf16 = records([5.0] * 18 + [2.0, 2.0], {10: 3.0, 20: 2.0})
    fp8 = records([5.0] * 18 + [2.0, 2.2], {10: 3.0, 20: 2.5})
    assert rows({"fp8": fp8, "bf16": bf16}) == [
        ("FP8", "20", "5.000", "2.1000", "+5.00%", "2.5000", "+25.00%", "20"),
        ("BF16", "20", "5.000", "2.0000", "", "2.0000", "", "20"),
    ]
    assert rows({"fp8": fp8}) == [("FP8", "20", "5.000", "2.1000", "", "2.5000", "", "20")]


def test_an_unfinished_precision_is_compared_over_the_steps_that_both_have() -> None:
    fp8 = records([5.0] * 18 + [1.0, 1.0], {10: 3.0, 20: 1.0})
    bf16 = records([5.0] * 9 + [4.0], {10: 2.0})
    assert rows({"fp8": fp8, "bf16": bf16})[0][3:7] == ("1.0000", "+25.00%", "1.0000", "+50.00%")


@pytest.mark.parametrize("steps", [1, 39])
def test_the_picture_shows_what_was_trained(steps: int, tmp_path: Path) -> None:
    falling = records([5.5 / step for step in range(1, steps + 1)], {steps: 0.5})
    lower = records([step["loss"] / 2 for step in falling], {})
    pictures = []
    trained: list[dict[Precision, list[StepRecord]]] = [
        {"fp8": falling, "bf16": falling},
        {"fp8": lower, "bf16": falling},
        {"bf16": falling},
    ]
    for curves in trained:
        plot_losses(curves, "title", tmp_path / "loss.png")
        pictures.append((tmp_path / "loss.png").read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
        width, height = struct.unpack(">II", pictures[-1][16:24])
        assert (width, height) >= (1000, 600)
    assert len(set(pictures)) == 3
