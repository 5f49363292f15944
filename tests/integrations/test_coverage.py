"""The table of what fp8moe computes is that of the installed transformers."""

from pathlib import Path

import pytest

from tests.integrations.transformers_support import transformers

coverage = pytest.importorskip("fp8moe.integrations.transformers.coverage", exc_type=ImportError)

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers-coverage.md"
FIGURES = 2
"""The last columns: they depend on the CPU."""


def cells(table: str) -> list[list[str]]:
    """Of each row."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_the_documented_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Also: what fp8moe computes agrees with eager in each class, or the command fails."""
    assert coverage.main() == 0
    printed, documented = cells(capsys.readouterr().out), cells(DOCUMENT.read_text())
    if transformers.__version__.startswith("5.24."):  # the one that the document is of
        assert [row[:-FIGURES] for row in printed] == [row[:-FIGURES] for row in documented]
    assert len(printed) > 60
    verdicts = {row[0]: row[4] for row in printed}
    assert verdicts["Qwen3MoeExperts"] == verdicts["AriaExperts"] == "FP8"


def test_tells_when_a_class_comes_out_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (experts,) = (experts for experts in coverage.all_experts() if type(experts).__name__ == "MixtralExperts")
    right = coverage._run

    def zeros(experts: object, implementation: str) -> object:
        return [tensor * (implementation == "eager") for tensor in right(experts, implementation)]

    monkeypatch.setattr(coverage, "all_experts", lambda: [experts])
    monkeypatch.setattr(coverage, "_run", zeros)
    assert coverage.main() == 1
    assert "**wrong** | 0.0 dB | 0.0 dB" in capsys.readouterr().out
