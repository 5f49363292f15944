"""What is saved for backward, of functions that save what is known."""

from typing import Any

import torch
from torch import Tensor

from fp8moe.bench.memory import belongs_to_weight, grows_with_rows, peak_bytes, saved_tensors, storage_bytes
from fp8moe.bench.op_problem import OpProblem
from fp8moe.bench.shapes import Routing, Shape
from fp8moe.bench.variants import bf16_op, explanations_to_measure, fp8moe_variant

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
    assert belongs_to_weight(torch.zeros(4, 256, 128))
    assert not belongs_to_weight(torch.zeros(300, 128))


def test_bf16_saves_its_input_and_fp8moe_half_of_it() -> None:
    problem = OpProblem.random(Shape(512, 128, 384, 1), Routing.EVEN, [512], torch.bfloat16, CPU, seed=0)

    def saved_row_bytes(forward: Any) -> int:
        return storage_bytes(tensor for tensor in saved_tensors(forward) if grows_with_rows(tensor, 1))

    assert saved_row_bytes(lambda: problem.forward(bf16_op)) == 512 * 384 * 2
    (explanation,) = explanations_to_measure(CPU, None)
    # codes, one scale for 128 of them, and of the plan one number a row and two a padded row
    assert (
        saved_row_bytes(lambda: problem.forward(fp8moe_variant(explanation).op)) == 512 * 384 + 512 * 3 * 4 + 512 * 12
    )


def test_nobody_counts_the_peak_on_a_cpu() -> None:
    assert peak_bytes(lambda: torch.zeros(5), CPU) is None
