"""Text as bytes: what is read, what is held out, and which bytes make the batch of a step."""

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from platform import python_version

import torch
from torch import Tensor

STDLIB_BYTES = 16 * 2**20
"""At most this much of the standard library is read."""
_SKIPPED_DIRECTORIES = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    """Training text and held-out text, which do not overlap."""

    source: str
    """What it is, for people."""
    train: Tensor
    """uint8 `(bytes,)`."""
    validation: Tensor
    """uint8 `(bytes,)`."""
    files: int
    skipped: int
    """Files that were left out because they are not text."""
    sha256: str
    """Of all the text, in order: a run resumes only on the text it started on."""

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 `(batch_size, seq_len)` each, a function of the arguments alone.

        The sequences start anywhere in the training text; a target is the byte after its input.
        """
        choices = random.Random(f"{seed}:{step}")
        starts = [choices.randrange(len(self.train) - seq_len) for _ in range(batch_size)]
        return _windows(self.train, starts, seq_len)

    def validation_batches(self, count: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches spread evenly over the held-out text: the same ones every time."""
        last, windows = len(self.validation) - seq_len - 1, count * batch_size
        starts = [last * index // max(windows - 1, 1) for index in range(windows)]
        for first in range(0, windows, batch_size):
            yield _windows(self.validation, starts[first : first + batch_size], seq_len)


def load_corpus(data: str | None, seq_len: int) -> Corpus:
    """Read the text under `data`, a file or a directory, or the standard library's source if it is None.

    Files are laid end to end in an order that depends on their names alone but mixes directories. The last sixteenth
    is held out for validation: whole files, unless the last ones are so large that this would hold out over a quarter.

    Raises:
        ValueError: `data` is missing, unreadable, holds no text, or too little for sequences of `seq_len` bytes.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        name, option = f"Python {python_version()}'s standard library ({root})", "pass text with --data"
        source = f"the source of Python {python_version()}'s standard library"
        texts, skipped = _read_texts(_mixed(root, _walk(root, ".py", _SKIPPED_DIRECTORIES)), STDLIB_BYTES)
    else:
        root = Path(data)
        name, option, source = f"--data {data}", "pass a file or directory of UTF-8 text", root.name or data
        if root.is_dir():
            texts, skipped = _read_texts(_mixed(root, _walk(root)))
        elif root.is_file():
            texts, skipped = _read_texts([root])
        else:
            raise ValueError(f"{name} does not exist or is no file: {option}")
    text = b"".join(texts)
    if not text:
        raise ValueError(f"{name} holds no text ({skipped} files are binary or not UTF-8): {option}")
    cut = _cut(texts)
    if min(cut, len(text) - cut) < seq_len + 1:
        raise ValueError(
            f"{name} holds {len(text)} bytes, {len(text) - cut} of them held out for validation: too few for "
            f"sequences of seq_len={seq_len} bytes; pass more text, or a smaller --seq-len"
        )
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text[:cut], text[cut:]))
    return Corpus(source, train, validation, len(texts), skipped, hashlib.sha256(text).hexdigest())


def _walk(root: Path, suffix: str = "", skipped: Iterable[str] = ("__pycache__",)) -> Iterator[Path]:
    """The regular files under `root`, except hidden ones and those in directories named in `skipped`."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the directory {error.filename}: {error.strerror}; make it readable") from error

    for directory, subdirectories, files in os.walk(root, onerror=refuse):
        subdirectories[:] = [name for name in subdirectories if name not in skipped and not name.startswith(".")]
        paths = (Path(directory, name) for name in files if name.endswith(suffix) and not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _mixed(root: Path, paths: Iterable[Path]) -> list[Path]:
    """In an order that depends on names alone and has no meaning, so that any stretch of it is a fair sample."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def _read_texts(paths: Iterable[Path], limit: int | None = None) -> tuple[list[bytes], int]:
    """The contents of text files, up to `limit` bytes in all, and how many files were no text."""
    texts: list[bytes] = []
    skipped = total = 0
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; make it readable or move it away") from error
        if not _is_text(content):
            skipped += 1
        elif limit is not None and total + len(content) > limit:
            break
        elif content:
            texts.append(content)
            total += len(content)
    return texts, skipped


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _cut(texts: list[bytes]) -> int:
    """Where the held-out text starts."""
    total = sum(map(len, texts))
    cut = total - total // 16
    start = total
    for text in reversed(texts):
        start -= len(text)
        if start <= cut:
            break
    return start if total - start <= total // 4 else cut


def _windows(text: Tensor, starts: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    windows = torch.stack([text[start : start + seq_len + 1] for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]
