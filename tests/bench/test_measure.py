"""A variant is checked before it is timed, and what fails becomes a row."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fp8moe.bench.figures import Failure, Measurement
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import attempt, check_variant, measure_problem, why_no_graph
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Shape
from fp8moe.bench.tables import notes
from fp8moe.bench.task import Task
from fp8moe.bench.variants import Variant, bf16_op, bf16_variants
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
    into_main_grad, fp8, *others = found.variants
    ours = [row.name for row in (fp8, *others)]
    assert ours == [f"fp8moe auto {option.name}".strip() for option in task.options(shape)]
    assert isinstance(into_main_grad, Measurement)
    assert isinstance(fp8, Measurement)
    name = task.baselines(shape, CPU)[0].name
    assert (found.bf16.name, found.bf16.computed_by) == (name, "torch grouped_mm")
    assert into_main_grad.name == f"{name} main_grad"
    assert fp8.computed_by == "emulated"
    for row in (found.bf16, into_main_grad, *found.variants):
        assert isinstance(row, Measurement)
        like = into_main_grad if "main_grad" in row.name else found.bf16
        assert row.compared_with == like.name
        assert row.speed_against_bf16 == pytest.approx(like.both.median_ms / row.both.median_ms)
        assert row.both.min_ms <= row.both.median_ms <= row.both.max_ms
    for row in (found.bf16, fp8):
        assert list(row.sqnr_db) == ["out", *gradients]
        for timing in (row.forward, row.backward, row.both):
            assert timing.median_ms > 0
        assert row.saved_against_bf16 == pytest.approx(row.saved_row_bytes / found.bf16.saved_row_bytes)
        assert (row.graph, row.host_us, row.peak_bytes) == (None, None, None)
        assert row.no_graph_because == "a CPU has no CUDA graphs"


def test_what_a_product_saves_for_backward() -> None:
    problem = small_problem()
    expected = problem.products(bf16_op)
    plain, _ = bf16_variants("BF16", bf16_op, "")
    bf16, fp8 = (check_variant(each, problem, expected) for each in (plain, auto_variants(PRODUCT, SHAPE)[""]))
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
    assert why_no_graph(lambda: None, 499.0, 1.0) == "the device is busy throughout: a graph would change nothing"


def test_why_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(region: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nadvice of many lines")

    monkeypatch.setattr("fp8moe.bench.measure.captured", refuse)
    reason = "cannot be captured: called a synchronizing CUDA operation"
    assert why_no_graph(lambda: None, 501.0, 1.0) == reason
    monkeypatch.setattr("fp8moe.bench.measure.captured", lambda region: region)
    assert why_no_graph(lambda: None, 501.0, 1.0) is None


def failing(*arguments: object) -> Tensor:
    raise RuntimeError("it does not compile")


def slowly(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    time.sleep(0.02)
    return bf16_op(a, w, offs)


def test_the_fastest_of_pytorchs_ways_is_what_ratios_are_against() -> None:
    ways = [
        variant
        for name, op in (("BF16 slow", slowly), ("BF16 fast", bf16_op), ("BF16 broken", failing))
        for variant in bf16_variants(name, op, "torch")
    ]
    task = replace(PRODUCT, baselines=lambda shape, device: ways)
    found = measure_problem(task, SHAPE, task.balances[0], CPU, [partial(explain, CPU)], None, small_lab())
    assert found.bf16.name == "BF16 fast"
    rows = {row.name: row for row in found.variants}
    assert list(rows)[:5] == [
        "BF16 slow", "BF16 slow main_grad", "BF16 fast main_grad", "BF16 broken", "BF16 broken main_grad",
    ]  # fmt: skip
    assert rows["BF16 broken"] == Failure("BF16 broken", False, "RuntimeError: it does not compile")
    slow, adding = rows["BF16 slow"], rows["fp8moe auto main_grad"]
    assert isinstance(slow, Measurement)
    assert isinstance(adding, Measurement)
    assert (slow.compared_with, adding.compared_with) == ("BF16 fast", "BF16 fast main_grad")
    assert slow.speed_against_bf16 < 1
    printed = [line.plain for line in notes(found)]
    like = "of rows with main_grad, BF16 fast main_grad"
    assert f"/ BF16 is against the fastest of PyTorch's ways: BF16 fast; {like}." in printed
    assert "BF16 broken: RuntimeError: it does not compile" in printed
