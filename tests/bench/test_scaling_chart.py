"""The chart of layers on more and more ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from fp8moe.bench.distributed.scaling_chart import LINES, draw, main
from fp8moe.bench.distributed.ways import FP8_DISPATCH, PLAIN

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOUR = RESULTS / "four-h200"
RUNS = [FOUR / f"distributed{name}.json" for name in ("", "-one-rank", "-two-ranks", "-skewed", "-256-experts")]
RUNS += [RESULTS / "eight-h200" / f"distributed{name}.json" for name in ("", "-skewed", "-256-experts")]


@pytest.fixture
def drawn(figures: list[Figure], tmp_path: Path) -> Figure:
    """Of all runs on the host of four, and of those of eight ranks on another."""
    draw(RUNS, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_a_panel_for_each_layer_of_several_sizes_and_a_line_for_each_way(drawn: Figure) -> None:
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles == [
        "like DeepSeek-V3, 32 experts\n(4096, 8, 7168, 2048, 32)",
        "like DeepSeek-V3, 64 experts\n(4096, 8, 7168, 2048, 64)",
        "Qwen3-30B-A3B\n(8192, 8, 2048, 768, 128)",
        "DeepSeek-V3, 256 experts\n(4096, 8, 7168, 2048, 256)",
    ]
    ranks = [["1", "2", "4", "8"], ["1", "2", "4", "8"], ["1", "2", "4"], ["4", "8"]]
    for axes, measured in zip(drawn.axes, ranks, strict=True):
        assert [label.get_text() for label in axes.get_xticklabels()] == measured
        assert axes.get_ylim()[0] == 0
        assert [line.get_label() for line in axes.containers] == list(LINES)


def test_lines_are_tokens_a_second_and_bars_their_range(drawn: Figure) -> None:
    by_name = {line.get_label(): line for line in drawn.axes[1].containers}
    for name in (PLAIN, FP8_DISPATCH):
        times = []
        for run in (RUNS[1], RUNS[2], RUNS[0], RUNS[5]):
            problem = json.loads(run.read_text())["problems"][1]
            times += [row["both"] for row in (problem["bf16"], *problem["variants"]) if row["name"] == name]
        line = by_name[name]
        assert isinstance(line, ErrorbarContainer)
        assert line.lines[0].get_ydata() == pytest.approx([4096 / time["median_ms"] for time in times])
        ends = [segment[:, 1].tolist() for segment in line.lines[2][0].get_segments()]
        for end, time in zip(ends, times, strict=True):
            assert end == pytest.approx([4096 / time["max_ms"], 4096 / time["min_ms"]])


def test_a_way_that_failed_somewhere_has_no_point_there(figures: list[Figure], tmp_path: Path) -> None:
    document = json.loads(RUNS[0].read_text())
    for problem in document["problems"]:
        problem["variants"] = [{"name": FP8_DISPATCH, "is_ours": True, "error": "no"}]
    (tmp_path / "failed.json").write_text(json.dumps(document))
    draw([tmp_path / "failed.json", RUNS[1]], tmp_path / "scaling.png")
    lines = [line for line in figures[0].axes[0].containers if isinstance(line, ErrorbarContainer)]
    ranks = {line.get_label(): np.asarray(line.lines[0].get_xdata()).tolist() for line in lines}
    assert (ranks[PLAIN], ranks[FP8_DISPATCH]) == ([1, 4], [1])


def test_one_size_is_no_chart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer with uniform routing"):
        draw([RUNS[0], RUNS[3]], tmp_path / "scaling.png")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "scaling.png"
    assert main([str(chart), *map(str, RUNS[:2])]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert main([str(chart), str(RUNS[0])]) == 2
    assert "no layer with uniform routing" in capsys.readouterr().err
    assert main([str(chart), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    for arguments, code in (([], 2), ([str(chart)], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
