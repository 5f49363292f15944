"""A corpus that is tokens already, as `scripts/build_corpus.py` makes it: what lies in its directory."""

import hashlib
import json
import lzma
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MANIFEST = "corpus.json"
"""Its manifest: a directory that has one holds tokens."""


class Tokens(NamedTuple):
    """What a directory of tokens holds."""

    train: Tensor
    """int32 `(tokens,)`."""
    held_out: Tensor
    """int32 `(tokens,)`, of other documents."""
    vocabulary: int
    """Tokens are smaller."""
    vocabulary_file: Path
    sha256: str
    """Of both."""


def load_tokens(directory: Path) -> Tokens:
    """Read the tokens in `directory`, and check them against its manifest.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what the manifest says.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        vocabulary = int(manifest["tokenizer"]["vocabulary"])
        train, held_out = (
            _read(directory / f"{split}.xz", manifest[split], vocabulary) for split in ("train", "held_out")
        )
    except (KeyError, TypeError, lzma.LZMAError) as error:
        raise ValueError(
            f"{directory / MANIFEST} is not the manifest of what lies there ({error}): build it anew"
        ) from (error)
    sha256 = hashlib.sha256("".join(manifest[split]["sha256"] for split in ("train", "held_out")).encode()).hexdigest()
    return Tokens(train, held_out, vocabulary, directory / "tokenizer.json", sha256)


def _read(file: Path, expected: dict[str, Any], vocabulary: int) -> Tensor:
    raw = lzma.decompress(file.read_bytes())
    if hashlib.sha256(raw).hexdigest() != expected["sha256"]:
        raise ValueError(f"{file} is not what {MANIFEST} says: build the corpus anew")
    tokens = torch.from_numpy(np.frombuffer(raw, dtype="<u2").astype(np.int32))
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise ValueError(f"{file} has the token {int(tokens.max())}, of a vocabulary of {vocabulary}")
    return tokens


def decode(vocabulary_file: Path, tokens: Iterable[int]) -> bytes:
    """The text of tokens of a byte-level BPE tokenizer, whose vocabulary spells each byte as one character."""
    model = json.loads(vocabulary_file.read_text())["model"]
    words = {number: word for word, number in model["vocab"].items()}
    return b"".join(map(partial(_bytes_of, _byte_alphabet()), (words[token] for token in tokens)))


def _bytes_of(alphabet: dict[str, int], word: str) -> bytes:
    return bytes(alphabet[character] for character in word) if set(word) <= alphabet.keys() else word.encode()


def _byte_alphabet() -> dict[str, int]:
    """The character for each byte, as in GPT-2: itself if it prints, else one from 256 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + index): byte for index, byte in enumerate(others)}
