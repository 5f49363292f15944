"""A variant is checked before it is timed, and what fails becomes a row."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import Failure, Measurement, attempt, check_variant, measure_graph, measure_problem
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Shape
from fp8moe.bench.task import Task
from fp8moe.bench.timing import Timing
from fp8moe.bench.variants import BF16, Variant, bf16_op
from fp8moe.gemm.explain import explain
from tests.bench.support import CPU, LAYER_SHAPE, SHAPE, auto_variants, small_lab, small_problem


def test_problem_is_random_and_repeatable() -> None:
    problem, same = small_problem(), small_problem()
    for tensor, twin in zip(
        (*problem.inputs.values(), problem.d_out), (*same.inputs.values(), same.d_out), strict=True
    ):
        assert torch.equal(tensor, twin)
        assert tensor.float().std() > 0.05
    assert problem.arguments["offs"].tolist() == [121, 121, 200]
    assert problem.arguments["offs"].dtype is torch.int32
    assert problem.forward(bf16_op).float().std().item() == pytest.approx(1.0, abs=0.1)


def test_products_are_those_of_each_group() -> None:
    problem = small_problem()
    products = problem.products(bf16_op)
    a, w = (problem.arguments[name].detach().float() for name in ("a", "w"))
    d_out = problem.d_out.float()
    torch.testing.assert_close(products["out"][121:].float(), a[121:] @ w[2].t(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(products["d_a"][:121].float(), d_out[:121] @ w[0], rtol=0.02, atol=0.05)
    torch.testing.assert_close(products["d_w"][2].float(), d_out[121:].t() @ a[121:], rtol=0.02, atol=0.2)
    assert (products["d_w"][1] == 0).all()


@pytest.mark.parametrize(
    ("task", "shape", "gradients"),
    [
        (PRODUCT, SHAPE, ["d_a", "d_w"]),
        (LAYER, LAYER_SHAPE, ["d_hidden", "d_topk_weights", "d_w_gate_up", "d_w_down"]),
    ],
    ids=["product", "layer"],
)
def test_every_figure_of_a_problem(task: Task, shape: Shape, gradients: list[str]) -> None:
    found = measure_problem(task, shape, task.balances[0], CPU, [partial(explain, CPU)], None, small_lab())
    assert (found.kernels, found.failures) == ([], [])
    assert [row.name for row in found.variants] == [f"fp8moe auto {option.name}".strip() for option in task.options]
    fp8 = found.variants[0]
    assert isinstance(fp8, Measurement)
    assert (found.bf16.name, found.bf16.computed_by) == ("BF16", "torch grouped_mm")
    assert fp8.computed_by == "emulated"
    for row in (found.bf16, fp8):
        assert list(row.sqnr_db) == ["out", *gradients]
        for timing in (row.forward, row.backward, row.both):
            assert timing.median_ms > 0
        assert row.speed_against_bf16 == pytest.approx(found.bf16.both.median_ms / row.both.median_ms)
        assert row.saved_against_bf16 == pytest.approx(row.saved_row_bytes / found.bf16.saved_row_bytes)
        assert (row.graph, row.host_us, row.peak_bytes) == (None, None, None)
        assert row.no_graph_because == "a CPU has no CUDA graphs"


def test_what_a_product_saves_for_backward() -> None:
    problem = small_problem()
    expected = problem.products(bf16_op)
    bf16, fp8 = (check_variant(variant, problem, expected) for variant in (BF16, auto_variants(PRODUCT)[""]))
    assert bf16.saved_row_bytes == 200 * 128 * 2
    # token codes and scales at a capacity of 512; of the plan, two numbers a padded row and one a row
    assert fp8.saved_row_bytes == 512 * 128 + 4 * 128 * 4 + 2 * 512 * 4 + 200 * 4
    assert all(26 < decibels < 40 for decibels in fp8.sqnr_db.values())


def test_a_wrong_gradient_is_refused() -> None:
    def half_the_gradient(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return bf16_op(a, 0.5 * w + 0.5 * w.detach(), offs)

    problem = small_problem()
    wrong = Variant("wrong", half_the_gradient, lambda out: "", is_ours=True)
    with pytest.raises(WrongResultError, match=r"d_w is wrong: SQNR 6\.0 dB"):
        check_variant(wrong, problem, problem.products(bf16_op))


def test_who_computed_is_asked_of_the_output() -> None:
    problem = small_problem()
    variant = Variant("v", bf16_op, lambda out: f"a node {out.grad_fn is not None}", is_ours=False)
    assert check_variant(variant, problem, problem.products(bf16_op)).computed_by == "a node True"


def test_failures_become_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise RuntimeError("no such kernel")

    assert attempt("peer", False, fail) == Failure("peer", False, "RuntimeError: no such kernel")
    assert capsys.readouterr().err == ""
    assert attempt("own", True, fail) == Failure("own", True, "RuntimeError: no such kernel")
    assert "Traceback" in capsys.readouterr().err
    assert attempt("works", True, lambda: 5) == 5


def test_a_graph_is_only_tried_where_launches_cost_time() -> None:
    eager = Timing.of([1.0] * 9)
    assert measure_graph(lambda: None, 499.0, eager, small_lab()) == (
        None,
        "the device is busy throughout: a graph would change nothing",
    )


def test_why_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(region: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nadvice of many lines")

    monkeypatch.setattr("fp8moe.bench.measure.captured", refuse)
    reason = "cannot be captured: called a synchronizing CUDA operation"
    assert measure_graph(lambda: None, 501.0, Timing.of([1.0] * 9), small_lab()) == (None, reason)
