"""Set-up of the benchmark's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: on a busy machine, threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are drawn."""
    found: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, path: Path) -> None:
        found.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", remember)
    return found
