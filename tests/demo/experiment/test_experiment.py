"""An experiment in sittings, and what is reported of it."""

import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from matplotlib.axes import Axes

from fp8moe.__main__ import main
from fp8moe.demo.experiment import sitting
from fp8moe.demo.experiment.evidence import Evidence, observe
from fp8moe.demo.experiment.recipes import RECIPES, SIZES
from fp8moe.demo.experiment.results import Result, load, save
from fp8moe.demo.loop import Stop
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import RunConfig
from fp8moe.demo.training import StepRecord, Trainer

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT / "benchmarks" / "results"
_TINY = [
    "--layers=1", "--hidden=128", "--intermediate=128", "--experts=4", "--top-k=2", "--heads=4", "--backend=emulated",
    "--seq-len=32", "--batch-size=4", "--steps=8", "--warmup=2", "--eval-every=4", "--eval-batches=2", "--no-compile",
    "--device=cpu",
]  # fmt: skip


def run(output: Path, text: Path, *flags: str) -> int:
    return main(["experiment", "run", "--output", str(output), "--data", str(text), *_TINY, *flags])


def losses(result: Result) -> list[tuple[object, ...]]:
    return [(step["loss"], step["grad_norm"], step.get("val_loss")) for step in result["steps"]]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The time is up after so many steps."""
    taken = [0]

    class Clock:
        def __init__(self, signals: Stop, seconds: float, started: float) -> None:
            self.left = 1.0

        @property
        def requested(self) -> bool:
            taken[0] += 1
            return taken[0] > steps + 1  # it is asked before the run, too

    monkeypatch.setattr(sitting, "Clock", Clock)


def test_sittings_add_up_to_what_one_would_have_given(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = "--recipes=bf16,fp8-256,stress-fp8-128"
    assert run(tmp_path / "whole", text, recipes, "--seeds=3") == 0
    whole = load(tmp_path / "whole" / "results.json")
    assert list(whole) == ["bf16-seed3", "fp8-256-seed3", "stress-fp8-128-seed3"]

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert run(parts, text, recipes, "--seeds=3") == 0
    assert "bf16-seed3 stopped after 5 of 8 steps" in capsys.readouterr().out
    assert not load(parts / "results.json")
    with monkeypatch.context() as patch:
        stop_after(patch, 3 + 1 + 6)
        assert run(parts, text, recipes, "--seeds=3") == 0
    assert list(load(parts / "results.json")) == ["bf16-seed3"]
    assert run(parts, text, recipes, "--seeds=3") == 0
    for name, result in load(parts / "results.json").items():
        assert losses(result) == losses(whole[name])  # every float
        assert len(result["steps"]) == 8
        assert result["evidence"] is not None
    assert not list((parts / "runs").iterdir())  # what is complete is in results.json alone

    # Each recipe computes in its own way, on the same data, from the same parameters.
    first = [losses(result)[0][0] for result in whole.values()]
    assert first == [pytest.approx(5.545, abs=1e-3)] * 3
    assert losses(whole["bf16-seed3"]) != losses(whole["fp8-256-seed3"])
    assert whole["stress-fp8-128-seed3"]["config"]["lr"] == pytest.approx(5 * 8e-4)

    before = (parts / "results.json").read_bytes()
    assert run(parts, text, recipes, "--seeds=3") == 0  # nothing is left to do
    assert (parts / "results.json").read_bytes() == before
    assert run(parts, text, recipes, "--seeds=3", "--steps=9") == 2
    assert "has a run bf16-seed3 with other settings or data: pass another --output" in capsys.readouterr().err


_BRANCHED = "--recipes=branched-bf16,branched-fp8-128,branched-bf16-again"
_TRUNK = 3  # of eight steps


def test_branches_of_a_seed_have_the_steps_of_bf16_in_common(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = []

    def noting(step: Callable[[], StepRecord]) -> tuple[StepRecord, Evidence]:
        record, evidence = observe(step)
        observed.append(record["step"])
        return record, evidence

    monkeypatch.setattr(sitting, "observe", noting)
    monkeypatch.setattr(sitting, "_OBSERVED_STEP", 1)
    assert run(tmp_path, text, f"{_BRANCHED},bf16", "--seeds=3") == 0
    assert observed == [_TRUNK + 2, _TRUNK + 2, _TRUNK + 2, 2]  # as many steps after the branch as after the start
    found = load(tmp_path / "results.json")
    steps = {result["recipe"]: losses(result) for result in found.values()}
    assert [result.get("trunk_steps") for result in found.values()] == [_TRUNK, _TRUNK, _TRUNK, 0]
    assert steps["branched-bf16"] == steps["bf16"]  # every float of a run that never was stopped
    assert steps["branched-fp8-128"][:_TRUNK] == steps["bf16"][:_TRUNK]
    # The loss of a step is that of the parameters before it, the first ones being the trunk's in another precision.
    for mine, its in zip(steps["branched-fp8-128"][_TRUNK:], steps["bf16"][_TRUNK:], strict=True):
        assert mine != its
        assert mine[0] == pytest.approx(its[0], rel=0.05)
    assert found["branched-bf16-again-seed3"]["config"]["deterministic"] is False
    assert RECIPES["branched-bf16-again"].baseline == "branched-bf16"
    seen = {name: result["evidence"] for name, result in found.items()}
    assert {name: (its["fp8_gemms"], its["bf16_gemms"]) for name, its in seen.items() if its} == {
        "branched-bf16-seed3": (0, 6),
        "branched-fp8-128-seed3": (6, 0),
        "branched-bf16-again-seed3": (0, 6),
        "bf16-seed3": (0, 6),
    }
    assert not list((tmp_path / "runs").iterdir())


def test_trunks_and_branches_that_stop_go_on_as_if_they_had_not(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "whole", text, _BRANCHED, "--seeds=0,1") == 0
    parts = tmp_path / "parts"

    def sit(steps: int, printed: str) -> None:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert run(parts, text, _BRANCHED, "--seeds=0,1") == 0
        assert printed in capsys.readouterr().out

    sit(2, "trunk-seed0 stopped after 2 of 3 steps")
    sit(1 + 2, "branched-bf16-seed0 stopped after 5 of 8 steps")
    assert not load(parts / "results.json")
    trunk = Run.open(parts / "runs", "trunk-seed0").load_checkpoint("bf16")
    assert trunk is not None
    assert trunk["step"] == _TRUNK  # what the branch saved is the branch's alone
    sit(3 + 1 + 4, "branched-fp8-128-seed0 stopped after 7 of 8 steps")
    assert list(load(parts / "results.json")) == ["branched-bf16-seed0"]
    sit(1 + 1 + 5 + 1, "trunk-seed1 stopped after 0 of 3 steps")
    assert sorted(path.name for path in (parts / "runs").iterdir()) == ["branched-bf16-seed1", "trunk-seed1"]
    assert run(parts, text, _BRANCHED, "--seeds=0,1") == 0

    whole, found = load(tmp_path / "whole" / "results.json"), load(parts / "results.json")
    assert {name: losses(result) for name, result in found.items()} == {
        name: losses(result) for name, result in whole.items()
    }
    assert all(result["evidence"] for result in found.values())
    assert not list((parts / "runs").iterdir())


def test_branches_of_a_trunk_that_diverges_have_diverged(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, text, _BRANCHED, "--seeds=0", "--lr=1e25", "--warmup=0") == 0
    found = load(tmp_path / "results.json")
    assert len({result["diverged"] for result in found.values()}) == 1
    assert all(result["diverged"] and len(result["steps"]) == 1 for result in found.values())
    assert not list((tmp_path / "runs").iterdir())
    capsys.readouterr()
    assert main(["experiment", "report", str(tmp_path / "results.json"), "--curves", str(tmp_path / "curves.png")]) == 0
    assert "| branched-fp8-128 | 1 | diverged | none | diverged | none |  |" in capsys.readouterr().out


def test_what_is_reported_of_branches_leaves_the_trunk_out(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, text, "--recipes=branched-bf16,branched-fp8-128,bf16-again", "--seeds=0,1") == 0
    file, curves = tmp_path / "results.json", tmp_path / "curves.png"
    results = load(file)
    for result in results.values():
        for step in result["steps"]:
            in_trunk = step["step"] <= _TRUNK and "trunk_steps" in result
            step["tokens_per_second"], step["grad_norm"] = (9e9, 9e9) if in_trunk else (1000.0, 0.25)
    results["branched-fp8-128-seed1"]["steps"][0]["loss"] += 1e-6  # a trunk of another machine
    del results["bf16-again-seed0"]["trunk_steps"], results["bf16-again-seed1"]["trunk_steps"]  # as in old files
    for step in results["bf16-again-seed0"]["steps"] + results["bf16-again-seed1"]["steps"]:
        step["tokens_per_second"], step["grad_norm"] = 500.0, 0.5
    save(file, results)
    assert load(file) == results
    capsys.readouterr()
    assert main(["experiment", "report", str(file), "--curves", str(curves)]) == 0
    printed = capsys.readouterr().out
    rows = {row[0]: row for line in printed.splitlines() if len(row := line.strip("| ").split(" | ")) > 9}
    assert [rows["branched-fp8-128"][column] for column in (6, 7, 9)] == ["1,000", "1.000x", "0.250"]
    assert [rows["bf16-again"][column] for column in (6, 9)] == ["500", "0.500"]
    assert re.fullmatch(r"[+-]\d\.\d+%", rows["branched-fp8-128"][3])  # of one pair alone
    assert "- branched-fp8-128 with seed 1 has another trunk than its baseline, and no gap." in printed
    assert "go on from one checkpoint, which BF16 trained for 3 steps" in printed
    assert "Its gap is the noise floor" in printed
    assert curves.read_bytes().startswith(b"\x89PNG")


def test_the_profiler_tells_fp8_from_bf16(text: Path, tmp_path: Path) -> None:
    flags = ("--recipes=bf16,fp8-128,accumulated-bf16,accumulated-fp8-cache", "--seeds=0", "--layers=2", "--steps=4")
    assert run(tmp_path, text, *flags) == 0
    seen = {}
    for name, result in load(tmp_path / "results.json").items():
        assert result["evidence"] is not None
        assert result["evidence"]["kernels"]
        seen[name] = (result["evidence"]["fp8_gemms"], result["evidence"]["bf16_gemms"])
    # Two layers, two products, and two gradients of each; twice as many with two microbatches.
    assert seen == {
        "bf16-seed0": (0, 12),
        "fp8-128-seed0": (12, 0),
        "accumulated-bf16-seed0": (0, 24),
        "accumulated-fp8-cache-seed0": (24, 0),
    }


def test_recipes_name_their_tiles() -> None:
    """So that none changes with the library's default."""
    tiles = {name: recipe.config(RunConfig(**SIZES), 0).token_tile for name, recipe in RECIPES.items()}
    long = {name: int(name[-3:]) for name in RECIPES if name.endswith(("fp8-256", "fp8-512"))}
    assert len(long) == 5
    assert tiles == dict.fromkeys(RECIPES, 128) | long


def test_recipes_with_microbatches_see_as_many_tokens(text: Path, tmp_path: Path) -> None:
    assert run(tmp_path, text, "--recipes=bf16,accumulated-bf16", "--seeds=0") == 0
    results = load(tmp_path / "results.json")
    seen = [
        len(result["steps"]) * result["config"]["batch_size"] * result["config"]["seq_len"]
        for result in results.values()
    ]
    assert seen == [8 * 4 * 32] * 2
    assert results["accumulated-bf16-seed0"]["config"]["microbatches"] == 2


def test_the_time_limit_stops_and_no_run_is_begun_that_would_not_end(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "none", text, "--recipes=bf16", "--seconds=0") == 0
    assert "0 runs have results; 3 of this plan are missing" in capsys.readouterr().out

    monkeypatch.setattr(sitting.Clock, "left", property(lambda clock: 1e-9))
    monkeypatch.setattr(sitting.Clock, "requested", property(lambda clock: False))
    assert run(tmp_path / "one", text, "--recipes=bf16", "--only-whole-runs") == 0
    printed = capsys.readouterr().out
    assert "the rest is for another sitting" in printed
    assert "1 runs have results; 2 of this plan are missing" in printed


def test_a_run_of_which_little_is_left_says_little_of_how_long_others_take(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert run(tmp_path, text, "--recipes=bf16", "--seeds=0,1") == 0
    now = [0.0]
    take = Trainer.train_step

    def in_10_seconds(trainer: Trainer) -> StepRecord:
        now[0] += 10
        return take(trainer)

    monkeypatch.setattr(Trainer, "train_step", in_10_seconds)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert run(tmp_path, text, "--recipes=bf16", "--seeds=0,1", "--seconds=60", "--only-whole-runs") == 0
    printed = capsys.readouterr().out
    assert "50 s are left, and a run takes 80: the rest is for another sitting" in printed
    assert list(load(tmp_path / "results.json")) == ["bf16-seed0"]


def test_one_process_trains_in_a_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(tmp_path / "lock"):
        assert run(tmp_path, text, "--recipes=bf16") == 2
    assert "another process trains in" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_what_a_process_that_was_killed_left_is_removed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_die(file: Path, results: dict[str, Result]) -> None:
        save(file, results)
        if len(results) == 2:
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(sitting, "save", save_and_die)
        with pytest.raises(SystemExit):
            run(tmp_path, text, "--recipes=branched-bf16,branched-fp8-128", "--seeds=0")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"branched-fp8-128-seed0", "trunk-seed0"}
    assert run(tmp_path, text, "--recipes=bf16", "--seeds=0") == 0  # which does not know of them
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"branched-fp8-128-seed0", "trunk-seed0"}
    assert run(tmp_path, text, "--recipes=branched-bf16,branched-fp8-128", "--seeds=0") == 0
    assert not list((tmp_path / "runs").iterdir())


def test_a_point_of_a_curve_lies_where_the_last_of_its_steps_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8moe.demo.experiment.curves import plot

    drawn: list[tuple[list[float], list[float]]] = []
    draw = Axes.plot

    def watched(axes: Axes, x: Any, y: Any, **style: Any) -> Any:
        drawn.append((list(x), list(y)))
        return draw(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", watched)
    plot(load(PUBLISHED / "loss-curves" / "branched.json.xz"), tmp_path / "curves.png")
    steps, gaps = drawn[-1]
    millions = [number * 32 * 1024 / 1e6 for number in range(1, 1001)]
    assert steps == pytest.approx(millions[39:])  # a point is the mean of 40 steps
    trunk = 400 - 39
    assert not any(gaps[:trunk])
    assert all(gaps[trunk : trunk + 10])


def test_a_run_that_diverges_is_a_result(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, text, "--recipes=bf16,fp8-128", "--seeds=0", "--lr=1e25", "--warmup=0") == 0
    results = load(tmp_path / "results.json")
    assert [bool(result["diverged"]) for result in results.values()] == [True, True]
    capsys.readouterr()
    assert main(["experiment", "report", str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| fp8-128 \| 1 \| diverged \| none \|", printed)
    assert "- bf16 with seed 0 diverged: bf16: at step" in printed


def test_results_of_several_machines_are_one_report(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for seed in (0, 1):
        assert run(tmp_path / str(seed), text, "--recipes=bf16,fp8-128", f"--seeds={seed}") == 0
        files.append(str(tmp_path / str(seed) / "results.json"))
    capsys.readouterr()
    table, curves = tmp_path / "table.md", tmp_path / "curves.png"
    assert main(["experiment", "report", *files, "--table", str(table), "--curves", str(curves)]) == 0
    printed = capsys.readouterr().out
    assert table.read_text() == printed
    assert curves.read_bytes().startswith(b"\x89PNG")
    row = next(line for line in printed.splitlines() if line.startswith("| fp8-128 "))
    assert re.search(r"\| 2 \| [\d.]+ \| [+-]0\.\d+% ± [\d.]+% \|", row)
    assert row.endswith("| 6 | 0 |")
    assert "standard deviation over seeds" in printed

    compressed = tmp_path / "first.json.xz"
    compressed.write_bytes(lzma.compress(Path(files[0]).read_bytes()))
    assert main(["experiment", "report", str(compressed), *files[1:]]) == 0
    assert capsys.readouterr().out == printed

    changed = json.loads(Path(files[0]).read_text())
    changed["results"]["bf16-seed0"]["steps"]["loss"][0] += 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    assert main(["experiment", "report", files[0], str(other)]) == 2
    assert "other.json has another run bf16-seed0" in capsys.readouterr().err


def test_wrong_flags(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, error in (
        (["--recipes=bf16,fp4"], "'fp4' is not one of bf16, bf16-again, fp8-128"),
        (["--seeds=one"], "'one' is not a list of numbers"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, text, *flags)
        assert error in capsys.readouterr().err
    assert run(tmp_path, text, "--backend=triton", "--recipes=fp8-128") == 2
    assert "error: " in capsys.readouterr().err
    assert main(["experiment", "report", str(tmp_path / "absent.json")]) == 2
    assert "absent.json does not exist" in capsys.readouterr().err
    for name, content in (("broken.json", b"[]"), ("bytes.json", b"\xff"), ("broken.json.xz", b"{}")):
        (tmp_path / name).write_bytes(content)
        assert main(["experiment", "report", str(tmp_path / name)]) == 2
        assert f"{name} is not a file of results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "recipes"), [("loss-curves", 15), ("loss-curves-long", 3), ("loss-curves-stress", 3)]
)
def test_the_published_tables_are_those_of_the_published_results(
    folder: str, recipes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "loss-curves.md").read_text().splitlines()
    assert main(["experiment", "report", *map(str, (PUBLISHED / folder).glob("*.json.xz"))]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == recipes + 2
    assert set(rows) <= set(page)
