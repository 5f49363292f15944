"""The file of tuned models, and who decides on a device."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fp8moe
from fp8moe import doctor
from fp8moe.gemm import tuning
from fp8moe.gemm.cost import H200, SHIPPED, Cost, CostModel, Costs
from fp8moe.gemm.tuning import decided_by, deciding_model, read_models, tuning_path, write_model

CUDA = torch.device("cuda:0")
COSTS = Costs(
    bf16=Cost(1, 2e-6, 3e-6, 4e-9, host=10.5), fp8=Cost(5, 6e-6, 7e-6, 8e-9, host=20), fp8_cached=Cost(9, 1e-6, 0, 2e-9)
)
MODEL = CostModel("NVIDIA H100", "2026-01-02: by hand", product=COSTS, layer=replace(COSTS, bf16=Cost(0, 0, 0, 0)))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of tuned models of a process that has read none yet, on an H100."""
    path = tmp_path / "new" / "tuning.json"
    monkeypatch.setenv("FP8MOE_TUNING", str(path))
    monkeypatch.setattr(tuning, "device_name", lambda device: MODEL.device)
    tuning._deciding_model.cache_clear()
    yield path
    tuning._deciding_model.cache_clear()


def test_what_is_written_decides_here_and_nowhere_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(MODEL, path)
    decider = deciding_model(CUDA)
    assert decider.model == MODEL
    assert str(decider) == f"tuned on this NVIDIA H100 ({path}); measured 2026-01-02: by hand"
    monkeypatch.setattr(tuning, "device_name", lambda device: H200)
    assert deciding_model(CUDA).model is SHIPPED[H200]
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA H20")
    assert deciding_model(CUDA).model is SHIPPED[H200]
    assert "as there is none for NVIDIA H20 (python -m fp8moe tune measures one)" in str(deciding_model(CUDA))


def test_a_tuned_model_comes_before_the_shipped_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(replace(MODEL, device=H200), path)
    monkeypatch.setattr(tuning, "device_name", lambda device: H200)
    assert deciding_model(CUDA).model.product == COSTS


def test_a_new_model_takes_the_place_of_its_device_alone(path: Path) -> None:
    other = replace(MODEL, device="NVIDIA H20", measured="before")
    for model in (other, replace(MODEL, measured="before"), MODEL):
        write_model(model, path)
    assert read_models(path) == {other.device: other, MODEL.device: MODEL}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(MODEL, path)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_model(replace(MODEL, measured="later"), path)
    assert read_models(path) == {MODEL.device: MODEL}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_file_is_read_once(path: Path) -> None:
    before = deciding_model(CUDA)
    assert before.model is SHIPPED[H200]
    write_model(MODEL, path)
    assert deciding_model(CUDA) is before


def broken(**changes: object) -> str:
    entry = {"measured": "", "product": {}, "layer": {}}
    return json.dumps({"format": 2, "devices": {MODEL.device: {**entry, **changes}}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 1, "devices": {}}',
        '{"format": 3, "devices": {}}',
        '{"format": 2, "devices": []}',
        broken(),
        broken(measured=3),
        broken(product={"bf16": {"launch": 1}}),
        broken(product={"bf16": {"launch": -1, "activation": 0, "weight": 0, "multiply_add": 0}}),
    ],
)
def test_a_broken_file_is_told_with_the_fix(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    for _ in range(2):  # not only the first time
        with pytest.raises(
            ValueError, match=r"tuning\.json cannot be used .*Fix: delete it, and measure again"
        ) as told:
            deciding_model(CUDA)
    assert str(path) in str(told.value)
    with pytest.raises(ValueError, match="Fix: delete it"):
        write_model(MODEL, path)
    assert path.read_text() == text


def test_a_file_from_before_the_hosts_time_is_told(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"format": 1, "devices": {}}')
    with pytest.raises(ValueError, match="its format is 1, and this version of fp8moe reads 2"):
        deciding_model(CUDA)


def test_what_is_no_file_is_told(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="IsADirectoryError"):
        deciding_model(CUDA)


def test_doctor_tells_a_broken_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explain(device: torch.device) -> object:
        return fp8moe.explain(device) if device.type == "cpu" else deciding_model(device)

    path.mkdir(parents=True)
    monkeypatch.setattr(doctor, "explain", explain)
    monkeypatch.setattr(doctor, "_devices", lambda: [CUDA, torch.device("cpu")])
    assert doctor.run() == 1
    printed = capsys.readouterr().out
    assert f"fp8moe on cuda:0 cannot run: {path} cannot be used" in printed
    assert "EMULATED 2" in printed  # the others are still told


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FP8MOE_TUNING", "~/mine.json")
    assert tuning_path() == Path("/home/someone/mine.json")
    monkeypatch.setenv("FP8MOE_TUNING", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tuning_path() == Path("/cache/fp8moe/tuning.json")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert tuning_path() == Path("/home/someone/.cache/fp8moe/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("FP8MOE_TUNING")
    assert tuning_path() == Path("/home/someone/.cache/fp8moe/tuning.json")


def test_a_model_may_be_held_to(path: Path) -> None:
    with decided_by(MODEL):
        assert deciding_model(CUDA).model is MODEL
        with pytest.raises(KeyError), decided_by(replace(MODEL, measured="other")):
            raise KeyError
        assert deciding_model(CUDA).model is MODEL
    assert deciding_model(CUDA).model is SHIPPED[H200]
