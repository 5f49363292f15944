"""What is saved for backward, of functions that save what is known."""

from typing import Any

import torch
from torch import Tensor

from fp8moe.bench.memory import grows_with_rows, peak_bytes, saved_tensors, storage_bytes

CPU = torch.device("cpu")


class SavesOnPurpose(torch.autograd.Function):
    """Saves a view of its input, twice, and 40 bytes more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x[:1], x.t(), torch.zeros(10))
        return x.clone()


def test_views_count_once_and_whole() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    saved = saved_tensors(lambda: SavesOnPurpose.apply(x))
    assert len(saved) == 2
    assert storage_bytes(saved) == 6 * 5 * 4 + 10 * 4


def test_pytorchs_own_functions() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    w = torch.randn(5, 4, requires_grad=True)
    assert storage_bytes(saved_tensors(lambda: (x @ w).sin())) == (6 * 5 + 5 * 4 + 6 * 4) * 4
    assert saved_tensors(lambda: x + 1) == []


def test_the_graph_is_freed_afterwards() -> None:
    x = torch.randn(6, 5, requires_grad=True)

    def accumulator() -> Any:
        return x.view_as(x).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def forward() -> Tensor:
        accumulator().metadata["seen"] = True
        return x.sin().exp()  # the second saves what it makes

    saved_tensors(forward)
    assert "seen" not in accumulator().metadata


def test_what_grows_with_the_rows() -> None:
    assert grows_with_rows(torch.zeros(300, 128), num_experts=4)
    assert grows_with_rows(torch.zeros(300), num_experts=4)
    assert not grows_with_rows(torch.zeros(4), num_experts=4)
    assert not grows_with_rows(torch.zeros(4, 256, 128), num_experts=4)


def test_nobody_counts_the_peak_on_a_cpu() -> None:
    assert peak_bytes(lambda: torch.zeros(5), CPU) is None
