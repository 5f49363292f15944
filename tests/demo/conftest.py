"""Text for the demo to train on."""

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory of 40 text files, 60 kB."""
    directory = tmp_path / "text"
    for index in range(40):
        file = directory / f"part{index % 4}" / f"file{index}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"in file {index} line {line} says {line * index % 97}\n" for line in range(50)))
    return directory
