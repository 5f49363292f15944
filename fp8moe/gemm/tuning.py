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
"""Of the file. Raised when a coefficient is added, or changes its meaning."""
COMMAND = "python -m fp8moe tune"


@dataclass(frozen=True)
class DecidingModel:
    """The model that AUTO asks, and where it comes from."""

    model: CostModel
    origin: str

    def __str__(self) -> str:
        return f"{self.origin}; measured {self.model.measured}"


def deciding_model(device: torch.device) -> DecidingModel:
    """Of a CUDA device: tuned if there is a tuned one, else shipped, else that of the H200.

    Raises:
        ValueError: the tuned file cannot be read.
    """
    return _held_to or _deciding_model(device_name(device))


@contextmanager
def decided_by(model: CostModel) -> Iterator[None]:
    """Within the block `model` decides on every device: to measure what AUTO would not take."""
    global _held_to
    before, _held_to = _held_to, DecidingModel(model, "held to by the caller")
    try:
        yield
    finally:
        _held_to = before


def tuning_path() -> Path:
    """The file of this user's tuned models, whether it exists or not."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")) / "fp8moe" / "tuning.json"


def read_models(path: Path) -> dict[str, CostModel]:
    """The models of `path` by the names of their devices; none if there is no such file.

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
    """Put `model` into the file for its device, and keep the other devices'. Who reads meanwhile sees old or new.

    Raises:
        ValueError: what is there cannot be read.
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


_held_to: DecidingModel | None = None


@lru_cache
def _deciding_model(name: str) -> DecidingModel:
    """Read once: the choice must not change while a process runs."""
    path = tuning_path()
    if tuned := read_models(path).get(name):
        return DecidingModel(tuned, f"tuned on this {name} ({path})")
    if name in SHIPPED:
        return DecidingModel(SHIPPED[name], f"shipped, of {name}")
    return DecidingModel(SHIPPED[H200], f"shipped, of {H200}: there is none of {name}; measure one with {COMMAND}")


def _model(device: str, entry: dict[str, Any]) -> CostModel:
    if not isinstance(entry["measured"], str):
        raise TypeError(f"'measured' of {device} is {entry['measured']!r}; it must be a text")
    return CostModel(device, entry["measured"], _costs(entry["product"]), _costs(entry["layer"]))


def _costs(entry: dict[str, dict[str, float]]) -> Costs:
    return Costs(**{name: Cost(**coefficients) for name, coefficients in entry.items()})
