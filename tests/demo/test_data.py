"""The text that is read, what is held out of it, and the batches."""

from pathlib import Path

import pytest
import torch

from fp8moe.demo.data import Corpus, load_corpus

SEQ_LEN = 32


def contents(corpus: Corpus) -> tuple[bytes, bytes]:
    return bytes(corpus.train.tolist()), bytes(corpus.validation.tolist())


def test_a_batch_is_a_function_of_seed_and_step_and_a_target_is_the_next_byte(text: Path) -> None:
    corpus = load_corpus(str(text), SEQ_LEN)
    inputs, targets = corpus.batch(seed=1, step=5, batch_size=4, seq_len=SEQ_LEN)
    assert inputs.shape == targets.shape == (4, SEQ_LEN)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    train, _ = contents(corpus)
    for row, last in zip(inputs, targets[:, -1], strict=True):
        assert bytes([*row.tolist(), int(last)]) in train

    corpus.batch(seed=1, step=6, batch_size=4, seq_len=SEQ_LEN)  # whatever was drawn in between
    torch.manual_seed(123)
    again = load_corpus(str(text), SEQ_LEN).batch(seed=1, step=5, batch_size=4, seq_len=SEQ_LEN)
    assert torch.equal(again[0], inputs)
    for seed, step in ((1, 6), (2, 5), (5, 1)):
        assert not torch.equal(corpus.batch(seed, step, 4, SEQ_LEN)[0], inputs)


def test_whole_files_are_held_out(text: Path) -> None:
    train, validation = contents(load_corpus(str(text), SEQ_LEN))
    files = [file.read_bytes() for file in text.rglob("*.txt")]
    assert len(train) + len(validation) == sum(map(len, files))
    assert all((file in train) != (file in validation) for file in files)
    assert 1 / 16 <= len(validation) / len(train + validation) < 1 / 8


@pytest.mark.parametrize("sizes", [[5000], [100, 5000], [3000, 3000]])
def test_few_files_are_cut(tmp_path: Path, sizes: list[int]) -> None:
    for index, size in enumerate(sizes):
        (tmp_path / f"{index}.txt").write_bytes(bytes(33 + position * 7 % 90 for position in range(size)))
    corpus = load_corpus(str(tmp_path), SEQ_LEN)
    total = sum(sizes)
    assert len(corpus.train) + len(corpus.validation) == total
    assert total // 16 <= len(corpus.validation) <= total // 4


def test_the_order_depends_on_names_alone(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for file in sorted(text.rglob("*.txt"), reverse=True):
        target = copy / file.relative_to(text)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    assert load_corpus(str(copy), SEQ_LEN).sha256 == load_corpus(str(text), SEQ_LEN).sha256
    (copy / "part0" / "file0.txt").write_text("changed")
    assert load_corpus(str(copy), SEQ_LEN).sha256 != load_corpus(str(text), SEQ_LEN).sha256


def test_what_is_no_text_is_left_out(text: Path) -> None:
    before = load_corpus(str(text), SEQ_LEN)
    (text / "latin1.txt").write_bytes("für".encode("latin-1"))
    (text / "program").write_bytes(b"\x7fELF\0\0")
    (text / "empty.txt").touch()
    (text / ".hidden").write_text("hidden")
    (text / ".cache").mkdir()
    (text / ".cache" / "cached.txt").write_text("cached")
    after = load_corpus(str(text), SEQ_LEN)
    assert after.sha256 == before.sha256


def test_validation_batches_are_the_same_each_time_and_reach_both_ends(text: Path) -> None:
    corpus = load_corpus(str(text), SEQ_LEN)
    first, again = (list(corpus.validation_batches(3, 4, SEQ_LEN)) for _ in range(2))
    assert len(first) == 3
    for (inputs, targets), (other, _) in zip(first, again, strict=True):
        assert torch.equal(inputs, other)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(first[0][0][0], corpus.validation[:SEQ_LEN].long())
    assert torch.equal(first[-1][1][-1], corpus.validation[-SEQ_LEN:].long())


def test_the_default_is_the_standard_library() -> None:
    corpus = load_corpus(None, SEQ_LEN)
    train, validation = contents(corpus)
    assert len(train) + len(validation) > 2**20
    assert b"import unittest" in train  # unittest itself is there, its tests are not
    assert corpus.sha256 == load_corpus(None, SEQ_LEN).sha256


def test_errors_name_the_argument_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data is .*absent, which does not exist: pass a file"):
        load_corpus(str(tmp_path / "absent"), SEQ_LEN)
    with pytest.raises(ValueError, match="0 bytes of UTF-8 text"):
        load_corpus(str(tmp_path), SEQ_LEN)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match=r"short.txt: 9 bytes.* seq_len=32 .*smaller --seq-len"):
        load_corpus(str(short), SEQ_LEN)
    short.write_bytes(b"\0\1\2" * 1000)
    with pytest.raises(ValueError, match="0 bytes of UTF-8 text"):
        load_corpus(str(short), SEQ_LEN)
