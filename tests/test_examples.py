"""The examples run as they are, and learn."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_training_loop_lowers_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "training_loop.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 6
    # Experts that returned zeros would leave the loss where it begins, at that of a uniform guess: ln 256, 5.5.
    assert 5.0 < losses[0] < 6.5
    assert losses[-1] < 3.0


def test_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fp8moe.integrations.transformers", exc_type=ImportError)
    runpy.run_path(str(EXAMPLES / "huggingface.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"model\.layers\.0\.mlp\.experts and 1 more +Qwen3MoeExperts +fp8moe in ", out)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 5
    assert 3.9 < losses[0] < 4.5  # that of a uniform guess is ln 64, 4.2
    assert losses[-1] < 2.0


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # torchtitan's router asks for fp32
def test_torchtitan(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fp8moe.integrations.torchtitan", exc_type=ImportError)
    runpy.run_path(str(EXAMPLES / "torchtitan_model.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"layers\.0\.moe\.routed_experts\.inner_experts and 1 more +FP8GroupedExperts +fp8moe in ", out)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 4
    assert 7.3 < losses[0] < 8.0  # that of a uniform guess is ln 2048, 7.6
    assert losses[-1] < 4.2


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "convert.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"experts\.0 and 1 more +Experts +fp8moe in ", out)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 5
    # From the third on in FP8. Experts that returned zeros would bring it back to 2: noise for noise.
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
