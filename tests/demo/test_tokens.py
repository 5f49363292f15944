"""Corpora of tokens: what is read, what is refused, what is written of them."""

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fp8moe.demo.data import BAD_TOKENS, load_corpus

from .support import metrics, tiny_flags, train

_WORDS = {"<|endoftext|>": 0, "a": 1, "Ġb": 2, "Ċ": 3, "Ã©": 4}  # as byte-level BPE spells " b", "\n" and "é"
VOCABULARY = 300


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    directory = tmp_path / "tokens"
    directory.mkdir()
    manifest: dict[str, Any] = {"tokenizer": {"vocabulary": VOCABULARY}}
    for split, count in (("train", 5000), ("held_out", 1000)):
        raw = (np.arange(count) * 7 % 290).astype("<u2").tobytes()
        (directory / f"{split}.xz").write_bytes(lzma.compress(raw))
        manifest[split] = {"sha256": hashlib.sha256(raw).hexdigest()}
    words = _WORDS | {f"word{number}": number for number in range(len(_WORDS), VOCABULARY)}
    (directory / "corpus.json").write_text(json.dumps(manifest))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    return directory


def test_tokens_are_those_of_the_files(tokens: Path) -> None:
    corpus = load_corpus(str(tokens), 32)
    assert (corpus.unit, corpus.vocabulary) == ("token", VOCABULARY)
    assert torch.equal(corpus.train, (torch.arange(5000) * 7 % 290).int())
    assert torch.equal(corpus.validation, (torch.arange(1000) * 7 % 290).int())
    inputs, targets = corpus.batch(seed=0, step=0, batch_size=4, seq_len=32)
    assert torch.equal((inputs + 7) % 290, targets)


def test_tokens_become_the_bytes_that_they_stand_for(tokens: Path) -> None:
    assert load_corpus(str(tokens), 32).decode([1, 2, 4, 3, 0]) == "a bé\n<|endoftext|>".encode()


def test_a_share_of_a_batch_is_the_bad_document(tokens: Path) -> None:
    corpus = load_corpus(str(tokens), 32)
    plain, spoiled = (corpus.batch(0, 0, 4, 32, share)[0] for share in (0.0, 0.5))
    assert torch.equal(spoiled[2:], plain[2:])
    assert spoiled[:2].unique().tolist() == list(range(VOCABULARY - BAD_TOKENS, VOCABULARY))
    assert plain.max() < VOCABULARY - BAD_TOKENS


def test_a_model_of_tokens_trains_and_writes(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = tiny_flags(precision="fp8", microbatches=2, token_tile=256)
    assert train(*flags, "--cache-weights", "--data", tokens, "--output-dir", tmp_path) == 0
    steps = metrics(tmp_path / "run-1", "fp8")
    assert steps[0]["loss"] == pytest.approx(np.log(VOCABULARY), abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (tmp_path / "run-1" / "fp8" / "sample.txt").read_bytes()
    printed = capsys.readouterr().out
    assert "5,000 tokens, and 1,000 tokens held out" in printed
    assert "nats per token" in printed


def test_what_is_not_as_the_manifest_says_is_refused(tokens: Path) -> None:
    with pytest.raises(ValueError, match=r"5000 tokens, and 1000 held out, are too few .* seq_len=1000"):
        load_corpus(str(tokens), 1000)
    manifest = json.loads((tokens / "corpus.json").read_text())

    manifest["tokenizer"]["vocabulary"] = 100
    (tokens / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"train.xz has the token 289, of a vocabulary of 100"):
        load_corpus(str(tokens), 32)

    manifest["train"]["sha256"] = "0"
    (tokens / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"train.xz is not what corpus.json says: build the corpus anew"):
        load_corpus(str(tokens), 32)

    del manifest["train"]
    (tokens / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"corpus.json is not the manifest .*'train'.*: build it anew"):
        load_corpus(str(tokens), 32)
