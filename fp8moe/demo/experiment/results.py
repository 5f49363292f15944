"""The results of an experiment: one JSON file, all that must travel between the machines that trained parts of it."""

import json
import lzma
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from fp8moe.demo.experiment.evidence import Evidence
from fp8moe.demo.runs import replacing
from fp8moe.demo.training import StepRecord


class Environment(TypedDict):
    """What a run trained with."""

    device: str
    torch: str
    triton: str
    fp8moe: str


class Result(TypedDict):
    """One run that has come to its end."""

    recipe: str
    baseline: str | None
    seed: int
    config: dict[str, Any]
    """The fields of its `RunConfig`."""
    data_sha256: str
    unit: str
    """What losses are per: `byte` or `token`."""
    environment: Environment
    auto: str
    """What `KernelPreference.AUTO` would take for these sizes on this device, and why."""
    diverged: str | None
    """Why it ended before its last step: a loss or gradient was not finite."""
    peak_memory: int
    """Bytes that PyTorch had allocated at most; 0 on a CPU."""
    evidence: Evidence | None
    """Of one step; None if it diverged before."""
    steps: list[StepRecord]
    """From the first step of all, those of the trunk included."""
    trunk_steps: NotRequired[int]
    """How many of the steps its seed's branches have in common; absent in old files, where there are none."""


Results = dict[str, Result]
"""By the name of the run."""


def own_steps(result: Result) -> list[StepRecord]:
    """The steps that the run took itself, after the trunk."""
    return result["steps"][result.get("trunk_steps", 0) :]


def load(file: Path) -> Results:
    """The results in a file, which `xz` may have compressed; none if it is not there yet.

    Raises:
        ValueError: it is no file of results.
    """
    if not file.exists():
        return {}
    try:
        content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        loaded = json.loads(content)["results"]
    except (KeyError, TypeError, ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{file} is not a file of results ({error})") from error
    return {name: unpacked(result) for name, result in loaded.items()}


def save(file: Path, results: Results) -> None:
    """Replace the file in one move."""
    packed = {name: _packed(result) for name, result in results.items()}
    with replacing(file) as stream:
        stream.write(f"{json.dumps({'results': packed})}\n".encode())


def merged(files: list[Path]) -> Results:
    """The results of several files.

    Raises:
        ValueError: one is no file of results or not there, or two have a run of one name and other losses.
    """
    results: Results = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} does not exist: pass files that `experiment run` has written")
        for name, result in load(file).items():
            if results.setdefault(name, result) != result:
                raise ValueError(f"{file} has another run {name} than the files before it: pass one of them")
    return results


def _packed(result: Result) -> dict[str, Any]:
    """Steps as columns: a third of the size."""
    steps = result["steps"]
    names = [name for name in steps[0] if name not in ("step", "val_loss")] if steps else []
    columns: dict[str, Any] = {name: [step[name] for step in steps] for name in names}  # type: ignore[literal-required]
    columns["val_loss"] = {step["step"]: step["val_loss"] for step in steps if "val_loss" in step}
    return {**result, "steps": columns}


def unpacked(packed: dict[str, Any]) -> Result:
    """What `save` wrote of a result."""
    columns = dict(packed["steps"])
    measured = {int(step): loss for step, loss in columns.pop("val_loss").items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for number, row in enumerate(rows, start=1):
        row["step"] = number
        if number in measured:
            row["val_loss"] = measured[number]
    return {**packed, "steps": rows}  # type: ignore[typeddict-item]
