"""What the tests draw: routings, values and shapes. Serves tests and parity checks alike."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

VALUE_KINDS = ("normal", "zeros", "subnormal", "huge", "outliers", "signed zeros")
NON_FINITE_KINDS = ("nan", "infinity", "negative nan")

SIZES = (1, 8, 127, 130, 192, 200)
"""Features that are no multiple of 128: rows of whole vectors of 16 bytes and others, one block and more."""


def group_sizes(max_groups: int = 6, max_rows: int = 300) -> st.SearchStrategy[list[int]]:
    """Rows of each group: empty, single, aligned, just off alignment, or anything; sometimes all on one expert."""
    size = st.one_of(st.sampled_from([0, 1, 127, 128, 129]), st.integers(0, max_rows))
    ragged = st.lists(size, min_size=1, max_size=max_groups)
    one_expert = st.tuples(st.integers(0, max_groups - 1), st.integers(0, max_rows)).map(
        lambda choice: [choice[1] if group == choice[0] else 0 for group in range(max_groups)]
    )
    return st.one_of(ragged, one_expert)


def offsets(sizes: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """`offs`, int32 `(E,)`, for groups of these sizes."""
    return torch.tensor(sizes, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def values(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Data of one character; random, but a function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    largest = torch.finfo(dtype).max
    if kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "signed zeros":
        x = torch.where(torch.rand(*shape, generator=generator) < 0.5, -0.0, x)
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).tiny * 0.1
    elif kind == "huge":
        x = x.sign() * largest * (1 - 0.5 * torch.rand(*shape, generator=generator))
    elif kind == "outliers":
        x = torch.where(torch.rand(*shape, generator=generator) < 0.01, x * 1000, x)
    elif kind in NON_FINITE_KINDS:
        bad = {"nan": float("nan"), "negative nan": -float("nan"), "infinity": float("inf")}[kind]
        x = torch.where(torch.rand(*shape, generator=generator) < 0.01, bad, x)
    elif kind != "normal":
        raise ValueError(f"kind is {kind!r}; it must be one of {VALUE_KINDS + NON_FINITE_KINDS}")
    return x.to(dtype)


def exact_values(*shape: int) -> Tensor:
    """fp32, each 0, 1.75, 3.5 or 7, of either sign: GEMMs of these are exact, and so the same bits on every machine.

    448 is 64 * 7, so FP8 holds them whatever tile they are in, and fp32 holds sums of some thousand products. The order
    in which a CPU adds depends on its instructions, and on the layout and the size of the matrices.
    """
    magnitudes = torch.tensor([0.0, 1.75, 3.5, 7.0])[torch.randint(4, shape)]
    return torch.where(torch.rand(shape) < 0.5, -magnitudes, magnitudes)


@st.composite
def choices(draw: st.DrawFn, max_tokens: int = 60) -> tuple[list[list[int]], int, int]:
    """What a router may choose: `(T, k)` ids as lists, `E` and `k`. Few experts and many, so that some stay empty and
    tokens choose one more than once; ids of no expert; sometimes nearly all on one."""
    num_experts, k = draw(st.sampled_from([1, 2, 5, 40])), draw(st.sampled_from([1, 2, 3, 8]))
    any_id = st.integers(-1, num_experts)
    favourite = draw(any_id)
    one_id = st.one_of(any_id, st.just(favourite)) if draw(st.booleans()) else any_id
    ids = draw(st.lists(st.lists(one_id, min_size=k, max_size=k), max_size=max_tokens))
    return ids, num_experts, k
