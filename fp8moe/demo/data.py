"""Text as bytes, or as tokens: what is read, what is held out, and what makes the batch of a step."""

import hashlib
import os
import random
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from platform import python_version

import torch
from torch import Tensor

from fp8moe.demo.tokens import MANIFEST, decode, load_tokens

BAD_TOKENS = 8
"""How many bytes or tokens the bad document of a stress test is made of."""
_SKIPPED_DIRECTORIES = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    """Training text and held-out text, which do not overlap."""

    source: str
    """What it is, for people."""
    train: Tensor
    """uint8 `(bytes,)`, or int32 `(tokens,)`."""
    validation: Tensor
    """As `train`."""
    sha256: str
    """Of all the text, in order: a run resumes only on the text it started on."""
    vocabulary: int = 256
    """Every byte or token is smaller."""
    unit: str = "byte"
    """What the model predicts: `byte` or `token`."""
    decode: Callable[[Iterable[int]], bytes] = bytes
    """Bytes or tokens to text."""

    def batch(
        self, seed: int, step: int, batch_size: int, seq_len: int, bad_share: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 `(batch_size, seq_len)` each, a function of the arguments alone.

        The sequences start anywhere in the training text; a target is the byte or token after its input. The first
        ones, `bad_share` of them, are a bad document: the `BAD_TOKENS` last of the vocabulary, over and over.
        """
        choices = random.Random(f"{seed}:{step}")
        starts = [choices.randrange(len(self.train) - seq_len) for _ in range(batch_size)]
        inputs, targets = _windows(self.train, starts, seq_len)
        bad = self.vocabulary - BAD_TOKENS + torch.arange(seq_len + 1) % BAD_TOKENS
        spoiled = round(bad_share * batch_size)
        inputs[:spoiled], targets[:spoiled] = bad[:-1], bad[1:]
        return inputs, targets

    def validation_batches(self, count: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches spread evenly over the held-out text: the same ones every time."""
        last, windows = len(self.validation) - seq_len - 1, count * batch_size
        starts = [last * index // max(windows - 1, 1) for index in range(windows)]
        for first in range(0, windows, batch_size):
            yield _windows(self.validation, starts[first : first + batch_size], seq_len)


def load_corpus(data: str | None, seq_len: int) -> Corpus:
    """Read the text under `data`, a file or a directory, or the standard library's source if it is None.

    A directory that `scripts/build_corpus.py` made is read as the tokens that lie there, with their own held-out split.

    Files are laid end to end in an order that depends on their names alone but mixes directories. The last sixteenth
    is held out for validation: whole files, unless the last ones are so large that this would hold out over a quarter.

    Raises:
        OSError: `data` is unreadable.
        ValueError: `data` does not exist, or holds too little text for sequences of `seq_len` bytes.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = f"the source of Python {python_version()}'s standard library"
        paths = _walk(root, ".py", _SKIPPED_DIRECTORIES)
    else:
        root = Path(data)
        if not root.exists():
            raise ValueError(f"data is {data}, which does not exist: pass a file or directory of UTF-8 text")
        source = root.name or data
        if (root / MANIFEST).is_file():
            return _of_tokens(root, seq_len)
        paths = iter([root]) if root.is_file() else _walk(root)
    # An order that depends on names alone and has no meaning, so that any stretch of it is a fair sample.
    mixed = sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    texts = [content for path in mixed if _is_text(content := path.read_bytes())]
    text = b"".join(texts)
    cut = _cut(texts)
    if min(cut, len(text) - cut) < seq_len + 1:
        raise ValueError(
            f"data is {data}: {len(text)} bytes of UTF-8 text, {len(text) - cut} of them held out for validation, are "
            f"too few for sequences of seq_len={seq_len} bytes; pass more text, or a smaller --seq-len"
        )
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text[:cut], text[cut:]))
    return Corpus(source, train, validation, hashlib.sha256(text).hexdigest())


def _of_tokens(root: Path, seq_len: int) -> Corpus:
    train, held_out, vocabulary, vocabulary_file, sha256 = load_tokens(root)
    if min(len(train), len(held_out)) < seq_len + 1:
        raise ValueError(
            f"data is {root}: {len(train)} tokens, and {len(held_out)} held out, are too few for sequences of "
            f"seq_len={seq_len}; pass a larger corpus, or a smaller --seq-len"
        )
    source = f"{root.name}, in tokens of a vocabulary of {vocabulary}"
    return Corpus(source, train, held_out, sha256, vocabulary, "token", partial(decode, vocabulary_file))


def _walk(root: Path, suffix: str = "", skipped: Collection[str] = ()) -> Iterator[Path]:
    """The regular files under `root`, except hidden ones and those in directories named in `skipped`."""

    def refuse(error: OSError) -> None:
        raise error

    for directory, subdirectories, files in os.walk(root, onerror=refuse):
        subdirectories[:] = [name for name in subdirectories if name not in skipped and not name.startswith(".")]
        paths = (Path(directory, name) for name in files if name.endswith(suffix) and not name.startswith("."))
        yield from (path for path in paths if path.is_file())


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
