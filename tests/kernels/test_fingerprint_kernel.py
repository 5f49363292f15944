"""The fingerprint's kernel against its definition, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.kernels.fingerprint import launch_find_changes
from fp8moe.quantize.fingerprint import SECTOR, SECTORS, as_lines, hash_chunks, num_chunks


def look(w: Tensor, number: int, known: Tensor, *, force: bool = False, chunks: int | None = None) -> list[int]:
    """What has changed."""
    changed = torch.full((chunks or num_chunks(w),), 7, dtype=torch.int32, device=w.device)
    step = torch.tensor([number], dtype=torch.int32, device=w.device)
    launch_find_changes(as_lines(w), step, known, changed, force=force, sectors=SECTORS, sector=SECTOR)
    return changed.tolist()


@given(
    num_experts=st.integers(1, 3), n=st.sampled_from([1, 100, 128, 200, 384]),
    k=st.sampled_from([1, 128, 130, 457, 512]), chunks=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), stored=st.sampled_from(["E,N,K", "E,K,N"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_definition(
    device: torch.device, num_experts: int, n: int, k: int, chunks: int, dtype: torch.dtype, stored: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(num_experts, n, k, generator=generator).to(device, dtype)
    w = w if stored == "E,N,K" else w.transpose(1, 2)
    chunks = min(chunks, num_experts * -(-n // 128) * -(-k // 128))
    known = torch.full((chunks, 2), -1, dtype=torch.int32, device=device)
    assert look(w, 5, known, chunks=chunks) == [1] * chunks
    assert known[:, 0].tolist() == hash_chunks(as_lines(w), chunks).tolist()
    assert known[:, 1].tolist() == [5] * chunks
    assert look(w, 5, known, chunks=chunks) == [0] * chunks
    assert look(w, 5, known, chunks=chunks, force=True) == [1] * chunks
    assert look(w, 6, known, chunks=chunks) == [1] * chunks
    before = known[:, 0].clone()
    w[num_experts - 1, (w.shape[1] - 1) // 128 * 128 :, (w.shape[2] - 1) // 128 * 128 :] *= -3  # the last block
    after = hash_chunks(as_lines(w), chunks)
    assert look(w, 6, known, chunks=chunks) == (after != before).int().tolist()
    assert known[:, 0].tolist() == after.tolist() != before.tolist()


def test_reads_nothing_outside(device: torch.device) -> None:
    around = torch.randn(2, 300, 300, device=device)
    w = around[:, 50:250, 7:137]
    known = torch.full((num_chunks(w), 2), -1, dtype=torch.int32, device=device)
    look(w, 0, known)
    inside = w.clone()
    around.fill_(torch.nan)
    w.copy_(inside)
    assert look(w, 0, known) == [0]


@pytest.mark.parametrize("num_experts", [31, 33, 65])
def test_chunks_that_are_not_whole(device: torch.device, num_experts: int) -> None:
    w = torch.randn(num_experts, 128, 128, device=device).bfloat16()
    chunks = num_chunks(w)
    known = torch.full((chunks, 2), -1, dtype=torch.int32, device=device)
    assert look(w, 0, known) == [1] * chunks
    assert known[:, 0].tolist() == hash_chunks(as_lines(w), chunks).tolist()
    w[-1] *= 2
    assert look(w, 0, known) == [0] * (chunks - 1) + [1]


@pytest.mark.gpu
def test_more_elements_than_int32() -> None:
    w = torch.zeros(9, 16384, 16384, device="cuda", dtype=torch.bfloat16)
    w[-1, -128:, -128:].normal_()
    w[0, :128, :128].normal_()
    chunks = num_chunks(w)
    known = torch.full((chunks, 2), -1, dtype=torch.int32, device="cuda")
    assert look(w, 0, known) == [1] * chunks
    w[-1, -128:, -128:] *= 2
    assert look(w, 0, known) == [0] * (chunks - 1) + [1]
    w[0, :128, :128] *= 2
    assert look(w, 0, known) == [1] + [0] * (chunks - 1)
