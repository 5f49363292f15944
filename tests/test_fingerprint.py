"""What of a weight is looked at to see whether it has changed, and what becomes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.quantize.fingerprint import MAX_CHUNKS, as_lines, find_changes, hash_chunks, num_chunks

SHAPE = (3, 256, 384)


def step(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


def memory(w: Tensor) -> tuple[Tensor, Tensor]:
    """`known` and `changed`, of which nothing is known yet."""
    chunks = num_chunks(w)
    return torch.zeros(chunks, 2, dtype=torch.int32), torch.full((chunks,), 7, dtype=torch.int32)


def test_each_block_is_sampled_in_four_runs_of_sixteen_in_places_of_its_own() -> None:
    w = torch.randn(1, 128, 256)  # two blocks, side by side
    runs = torch.zeros(128, 16, dtype=torch.bool)  # of 16 elements
    before = hash_chunks(as_lines(w), 1)
    for line in range(128):
        for run in range(16):
            changed = w.clone()
            changed[0, line, 16 * run : 16 * run + 16] *= -2
            runs[line, run] = hash_chunks(as_lines(changed), 1) != before
    left, right = runs[:, :8], runs[:, 8:]
    for block in (left, right):
        assert block.sum() == 4
        assert block.any(1).sum() == 4  # in four lines
    assert not torch.equal(left, right)
    for element in range(16):  # and each element of a run counts
        line, run = left.nonzero()[0].tolist()
        changed = w.clone()
        changed[0, line, 16 * run + element] *= -2
        assert hash_chunks(as_lines(changed), 1) != before


@given(
    expert=st.integers(0, 2), n_block=st.integers(0, 1), k_block=st.integers(0, 2), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_a_block_that_changes_is_seen_and_nothing_else(
    expert: int, n_block: int, k_block: int, seed: int, dtype: torch.dtype
) -> None:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    known, changed = memory(w)
    find_changes(w, step(0), known, changed, force=False)
    assert (changed == 1).all()  # of a hash that is not zero by luck
    find_changes(w, step(0), known, changed, force=False)
    assert (changed == 0).all()
    w[expert, 128 * n_block : 128 * n_block + 128, 128 * k_block : 128 * k_block + 128] *= 1.5
    find_changes(w, step(0), known, changed, force=False)
    assert changed.any()
    find_changes(w, step(0), known, changed, force=False)
    assert (changed == 0).all()


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 130, 200), (2, 257, 129), (2, 8, 300), (1, 100, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_block_of_a_weight_of_any_size_is_looked_at(shape: tuple[int, int, int], transposed: bool) -> None:
    w = torch.randn(shape)
    w = w.transpose(1, 2) if transposed else w
    known, changed = memory(w)
    for expert in range(w.shape[0]):
        for n in range(0, w.shape[1], 128):
            for k in range(0, w.shape[2], 128):
                find_changes(w, step(0), known, changed, force=False)
                w[expert, n : n + 128, k : k + 128] *= -2
                find_changes(w, step(0), known, changed, force=False)
                assert changed.any()


def test_steps_are_changes_and_so_is_what_is_forced() -> None:
    w = torch.zeros(SHAPE)
    known, changed = memory(w)
    find_changes(w, step(0), known, changed, force=True)
    assert (changed == 1).all()
    find_changes(w, step(1), known, changed, force=False)
    assert (changed == 1).all()
    find_changes(w, step(1), known, changed, force=False)
    assert (changed == 0).all()
    find_changes(w, step(1), known, changed, force=True)
    assert (changed == 1).all()


@pytest.mark.parametrize("swap", [(0, 1), (0, 2)])
def test_experts_that_change_places_are_a_change(swap: tuple[int, int]) -> None:
    w = torch.randn(SHAPE)
    known, changed = memory(w)
    find_changes(w, step(0), known, changed, force=True)
    w[[*swap]] = w[[*reversed(swap)]]
    find_changes(w, step(0), known, changed, force=False)
    assert changed.any()


def test_the_layout_does_not_change_how_much_is_seen() -> None:
    """Runs lie where memory is contiguous, whichever dimension that is."""
    stored = torch.randn(3, 384, 256)
    w = stored.transpose(1, 2)
    assert_same = hash_chunks(as_lines(w), num_chunks(w)), hash_chunks(as_lines(stored), num_chunks(stored))
    assert torch.equal(*assert_same)


def test_a_large_weight_has_a_limited_number_of_hashes() -> None:
    assert num_chunks(torch.empty(1, 128, 128)) == 1
    assert num_chunks(torch.empty(33, 128, 128, device="meta")) == 2
    assert num_chunks(torch.empty(256, 4096, 7168, device="meta")) == MAX_CHUNKS
