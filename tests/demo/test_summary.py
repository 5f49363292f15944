"""Numbers and picture of a run."""

import io
import struct

import numpy as np
import pytest

from fp8moe.demo.plot import plot_losses, smooth
from fp8moe.demo.summary import Records, summarize
from fp8moe.demo.training import StepRecord


def records(losses: list[float], val_losses: dict[int, float], rate: float = 10.0) -> list[StepRecord]:
    return [
        StepRecord(step, loss, 1.0, 1.0, 1e-3, 2.0, rate + step, val_losses.get(step))
        for step, loss in enumerate(losses, start=1)
    ]


def test_the_gap_is_relative_to_bf16_over_the_last_tenth() -> None:
    bf16 = records([5.0] * 18 + [2.0, 2.0], {10: 3.0, 20: 2.0})
    fp8 = records([5.0] * 18 + [2.0, 2.2], {10: 3.0, 20: 2.5})
    summaries = summarize({"fp8": fp8, "bf16": bf16})
    assert summaries["fp8"].train_gap == pytest.approx(0.05)
    assert summaries["fp8"].val_gap == pytest.approx(0.25)
    assert summaries["fp8"].last_loss == pytest.approx(2.1)
    assert summaries["fp8"].val_loss == 2.5
    assert (summaries["fp8"].first_loss, summaries["fp8"].steps, summaries["fp8"].seconds) == (5.0, 20, 40.0)
    assert summaries["fp8"].tokens_per_second == 20.5
    assert (summaries["bf16"].train_gap, summaries["bf16"].val_gap) == (None, None)


def test_an_unfinished_precision_is_compared_over_the_steps_that_both_have() -> None:
    fp8 = records([5.0] * 18 + [1.0, 1.0], {10: 3.0, 20: 1.0})
    summary = summarize({"fp8": fp8, "bf16": records([5.0] * 9 + [4.0], {10: 2.0})})["fp8"]
    assert summary.train_gap == pytest.approx(0.25)
    assert summary.val_gap == pytest.approx(0.5)
    assert summary.last_loss == 1.0
    nothing = summarize({"fp8": fp8, "bf16": []})
    assert nothing["fp8"].train_gap is None
    assert nothing["bf16"].last_loss is None


def test_smoothing_keeps_lines_straight_and_ends_on_the_latest_steps() -> None:
    line = np.linspace(5, 1, 50)
    np.testing.assert_allclose(smooth(line, 11)[:-5], line[:-5])
    assert smooth(line, 11)[-1] == pytest.approx(line[-6:].mean())
    np.testing.assert_allclose(smooth(line, 1), line)


def picture(curves: Records) -> bytes:
    stream = io.BytesIO()
    plot_losses(curves, "title", "subtitle", stream)
    return stream.getvalue()


def test_the_picture_shows_what_was_trained() -> None:
    falling = records([5.5 / step for step in range(1, 40)], {20: 1.0, 39: 0.5})
    both = picture({"fp8": falling, "bf16": falling})
    assert both.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", both[16:24])
    assert width >= 1000
    assert height >= 600
    alone = picture({"fp8": falling, "bf16": []})
    assert struct.unpack(">II", alone[16:24])[1] < height  # no gap to show
    assert picture({"bf16": falling[:1]}).startswith(b"\x89PNG")
    lower = records([step.loss / 2 for step in falling], {})
    assert picture({"fp8": lower, "bf16": falling}) != both
