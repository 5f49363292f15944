"""`python -m fp8moe bench --int8`: on a CPU the definitions are timed, in small sizes, and the rest is left out."""

import json
from pathlib import Path

import pytest
import torch

from fp8moe.__main__ import main
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.int8.command import section_table
from fp8moe.bench.int8.sections import SECTIONS, Bench, compare
from fp8moe.bench.int8.serving import serve
from tests.bench.support import CPU, small_lab


@pytest.fixture
def bench() -> Bench:
    return Bench(small_lab(), CPU, quick=True)


@torch.no_grad()
@pytest.mark.parametrize("name", SECTIONS)
def test_sections_time_every_way_that_a_cpu_has(bench: Bench, name: str) -> None:
    rows = list(SECTIONS[name](bench))
    assert bool(rows) == (name != "order")
    for row in rows:
        assert row.timing.median_ms > 0
        assert row.ratio > 0
        assert (row.copy_share is not None) == (name == "few")
    if name == "layer":
        assert [row.way for row in rows[:3]] == ["BF16 grouped_mm", "FP8", "INT8"]
        assert rows[0].ratio == 1
    assert section_table(name, rows).row_count == len(rows)


def test_what_is_wrong_is_not_timed(bench: Bench) -> None:
    x = torch.randn(4, 8)
    with pytest.raises(WrongResultError, match="case: other is wrong"):
        compare(bench, "case", {"first": lambda: x, "other": lambda: -x}, 20.0)


@torch.no_grad()
def test_serving(bench: Bench) -> None:
    results, line = serve(bench)
    document = json.loads(line)
    assert [each["way"] for each in document["ways"]] == [each.way for each in results]
    bf16, int8, int4 = results
    assert bf16.expert_bytes > int8.expert_bytes > int4.expert_bytes
    assert all(each.prefill_ms > 0 and each.decode_ms > 0 for each in results)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fp8moe.bench.cli._lab", lambda device, quick: small_lab())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--int8", "--only", "small,serving", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "int8.json").read_text())
    assert list(written["sections"]) == ["small", "serving"]
    assert "one pass" in (tmp_path / "int8.md").read_text()
    printed = capsys.readouterr().out
    assert "one pass" in printed
    assert json.loads(next(text for text in printed.splitlines() if text.startswith("{")))["what"] == "serving"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--only", "fast"], "--only 'fast' is not one of hoisting"), (["--layer"], "--int8 has its own shapes")],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--int8", *flags]) == 2
    assert message in capsys.readouterr().err
