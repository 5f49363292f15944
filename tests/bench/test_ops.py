"""A variant is checked before it is timed, and what fails becomes a row."""

import pytest
import torch
from torch import Tensor

from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.ops import Failure, attempt, check_variant, measure_graph, measure_variant
from fp8moe.bench.timing import Timing
from fp8moe.bench.variants import BF16, Variant, bf16_op, explanations_to_measure, fp8moe_variant
from tests.bench.support import CPU, small_lab, small_problem


def test_problem_is_random_and_repeatable() -> None:
    problem, same = small_problem(), small_problem()
    for tensor, twin in ((problem.a, same.a), (problem.w, same.w), (problem.dout, same.dout)):
        assert torch.equal(tensor, twin)
        assert tensor.float().std() > 0.05
    assert problem.offs.tolist() == [70, 70, 200]
    assert problem.offs.dtype is torch.int32
    assert problem.forward(bf16_op).float().std().item() == pytest.approx(1.0, abs=0.1)


def test_products_are_those_of_each_group() -> None:
    problem = small_problem()
    products = problem.products(bf16_op)
    a, w, dout = problem.a.detach().float(), problem.w.detach().float(), problem.dout.float()
    torch.testing.assert_close(products["out"][70:].float(), a[70:] @ w[2].t(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(products["da"][:70].float(), dout[:70] @ w[0], rtol=0.02, atol=0.05)
    torch.testing.assert_close(products["dw"][2].float(), dout[70:].t() @ a[70:], rtol=0.02, atol=0.2)
    assert (products["dw"][1] == 0).all()


def test_every_figure_of_a_variant() -> None:
    problem, lab = small_problem(), small_lab()
    expected = problem.products(bf16_op)
    (explanation,) = explanations_to_measure(CPU, None)
    fp8 = measure_variant(fp8moe_variant(explanation), problem, expected, lab)
    bf16 = measure_variant(BF16, problem, expected, lab)

    assert (fp8.name, fp8.computed_by) == ("fp8moe auto", "emulated")
    assert (bf16.name, bf16.computed_by) == ("BF16", "torch grouped_mm")
    assert all(26 < found.sqnr_db < 40 for found in fp8.agreement.values())
    assert list(fp8.agreement) == ["out", "da", "dw"]
    for timing in (fp8.forward, fp8.backward, fp8.both, bf16.forward, bf16.backward, bf16.both):
        assert timing.median_ms > 0
        assert timing.repeats == 2
    assert fp8.both.median_ms > bf16.both.median_ms  # it emulates
    # 3 GEMMs of 2 * 200 * 256 * 128 operations at 1e9 a second
    assert bf16.both_floor_ms == pytest.approx(3 * 13_107_200 / 1e9 * 1e3)
    assert fp8.forward_floor_ms is not None
    assert fp8.backward_floor_ms is not None
    assert fp8.both_floor_ms == pytest.approx(fp8.forward_floor_ms + fp8.backward_floor_ms)
    assert fp8.forward_floor_ms > 13_107_200 / 2e9 * 1e3
    assert bf16.saved_row_bytes == 200 * 128 * 2
    # token codes and scales at a capacity of 512; of the plan, two numbers a padded row and one a row
    assert fp8.saved_row_bytes == 512 * 128 + 4 * 128 * 4 + 2 * 512 * 4 + 200 * 4
    assert fp8.saved_weight_bytes == bf16.saved_weight_bytes == 3 * 256 * 128 * 2
    assert (fp8.graph, fp8.host_us, fp8.peak_bytes) == (None, None, None)
    assert fp8.no_graph_because == "a CPU has no CUDA graphs"


def test_a_wrong_gradient_is_not_timed() -> None:
    def half_the_gradient(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return bf16_op(a, 0.5 * w + 0.5 * w.detach(), offs)

    problem = small_problem()
    wrong = Variant("wrong", half_the_gradient, "bf16", lambda out: "", is_ours=True)
    with pytest.raises(WrongResultError, match=r"dw is wrong: SQNR 6\.0 dB"):
        measure_variant(wrong, problem, problem.products(bf16_op), small_lab())


def test_who_computed_is_asked_of_the_output() -> None:
    problem = small_problem()
    variant = Variant("v", bf16_op, "bf16", lambda out: f"a node {out.grad_fn is not None}", is_ours=False)
    assert check_variant(variant, problem, problem.products(bf16_op))[1] == "a node True"


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

    monkeypatch.setattr("fp8moe.bench.ops.captured", refuse)
    reason = "cannot be captured: called a synchronizing CUDA operation"
    assert measure_graph(lambda: None, 501.0, Timing.of([1.0] * 9), small_lab()) == (None, reason)
