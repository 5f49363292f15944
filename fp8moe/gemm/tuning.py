"""Which cost model decides on a device: the one that `python -m fp8moe tune` measured there, or a shipped one."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fp8moe.devices import device_name
from fp8moe.gemm.cost import H200, SHIPPED, Cost, CostModel, Costs

VARIABLE = "FP8MOE_TUNING"
"""The environment variable that names the file."""
FORMAT = 2
"""The version of the file format. It goes up when a coefficient is added or changes its meaning."""
COMMAND = "python -m fp8moe tune"


@dataclass(frozen=True, eq=False)  # its hash, a part of every decision's key, is that of its identity
class DecidingModel:
    """The cost model by which AUTO decides, and where it comes from."""

    model: CostModel
    origin: str

    def __str__(self) -> str:
        return f"{self.origin}; measured {self.model.measured}"


def deciding_model(device: torch.device) -> DecidingModel:
    """The model of a CUDA device: the tuned one if there is one, else the shipped one, else that of the H200.

    Raises:
        ValueError: the tuned file cannot be read.
    """
    return _override or _deciding_model(device_name(device))


def override() -> DecidingModel | None:
    """What decides on every device: that of `decided_by`, within its block."""
    return _override


@contextmanager
def decided_by(model: CostModel) -> Iterator[None]:
    """Within the block `model` decides on every device, so that what AUTO would not take can be measured."""
    global _override
    before, _override = _override, DecidingModel(model, "set by the caller")
    try:
        yield
    finally:
        _override = before


def tuning_path() -> Path:
    """The path of this user's tuned models, whether the file exists or not."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")) / "fp8moe" / "tuning.json"


def read_models(path: Path) -> dict[str, CostModel]:
    """The models in the file `path`, by the names of their devices; empty if there is no such file.

    Raises:
        ValueError: the file cannot be read, or is not what `write_model` writes.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}, and this version of fp8moe reads {FORMAT}")
        return {name: _model(name, entry) for name, entry in document["devices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be used to choose between FP8 and BF16 ({type(error).__name__}: {error}). "
            f"Fix: delete it, and measure again with {COMMAND}"
        ) from error


def write_model(model: CostModel, path: Path) -> None:
    """Write `model` to the file as that of its device, and keep those of other devices.

    The file is replaced at once: a reader sees either the old one or the new one.

    Raises:
        ValueError: the file that is there cannot be read.
        OSError: the file cannot be written.
    """
    models = {**read_models(path), model.device: model}
    entries = {
        name: {key: value for key, value in asdict(each).items() if key != "device"} for name, each in models.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f"{path.name}.", delete=False
    ) as file:
        try:
            file.write(json.dumps({"format": FORMAT, "devices": entries}, indent=1) + "\n")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


_override: DecidingModel | None = None


@lru_cache
def _deciding_model(name: str) -> DecidingModel:
    """Cached, because the decision must not change while a process runs."""
    path = tuning_path()
    if tuned := read_models(path).get(name):
        return DecidingModel(tuned, f"tuned on this {name} ({path})")
    if name in SHIPPED:
        return DecidingModel(SHIPPED[name], f"shipped for {name}")
    return DecidingModel(SHIPPED[H200], f"shipped for {H200}, as there is none for {name} ({COMMAND} measures one)")


def _model(device: str, entry: dict[str, Any]) -> CostModel:
    if not isinstance(entry["measured"], str):
        raise TypeError(f"'measured' of {device} is {entry['measured']!r}; it must be a text")
    return CostModel(device, entry["measured"], _costs(entry["product"]), _costs(entry["layer"]))


def _costs(entry: dict[str, dict[str, float]]) -> Costs:
    return Costs(**{name: Cost(**coefficients) for name, coefficients in entry.items()})
