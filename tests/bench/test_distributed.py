"""`bench --distributed`: a run of two ranks on the CPU, its parts, and the arguments that stop one."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8moe.bench.cli import BAD_ARGUMENTS, add_arguments, run
from fp8moe.bench.distributed import ways as ways_module
from fp8moe.bench.distributed.exchanges import Recording, Replay
from fp8moe.bench.distributed.measure import Site, measure_shape
from fp8moe.bench.distributed.plain import plain_experts, plain_layer, weighted_sums, weighted_sums_backward
from fp8moe.bench.distributed.problem import (
    ON_CPU,
    RankProblem,
    check_shape,
    default_shapes,
    draw_arrived_rows,
    draw_rank_problem,
)
from fp8moe.bench.distributed.ranks import Ranks, SlowestRank
from fp8moe.bench.distributed.scaling import main as plan
from fp8moe.bench.distributed.ways import FP8_DISPATCH, ways_of
from fp8moe.bench.distributed.wire import FP8_ROWS, PLAIN_ROWS, gathered_experts, measure_wire
from fp8moe.bench.layer.baseline import eager_layer
from fp8moe.bench.layer.experts import PLAIN
from fp8moe.bench.problem import Problem
from fp8moe.bench.shapes import Balance, layer_shape
from fp8moe.bench.timing import HostStopwatch, Stages
from fp8moe.distributed import TorchExchange, ep_moe_forward
from tests.bench.support import BUDGET, CPU
from tests.measures import sqnr

ROOT = Path(__file__).parents[2]
SHAPE = layer_shape(40, 3, 128, 128, 6)


def bench(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--distributed", *flags]))


def on_two_ranks(*flags: str) -> str:
    """What a run prints."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fp8moe", "bench"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, "--distributed", "--quick", *flags], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_ranks_measure_layers_and_the_wire(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = on_two_ranks("--shape", "32,2,128,128,4", "--routing", "few,uniform", "--output", str(tmp_path))
    assert printed.count("2 x CPU") == 1  # one rank prints
    assert "(32,2,128,128,4) on 2 ranks, few routing, 0 to 128 rows a rank, tokens to 1.00 ranks" in printed
    assert "they say nothing about GPUs" in printed

    document = json.loads((tmp_path / "distributed.json").read_text())
    assert (document["what"], document["ranks"]) == ("distributed", 2)
    assert document["command"].startswith("torchrun --nproc-per-node 2 -m fp8moe bench --distributed --quick")
    problem, uniform = document["problems"]
    assert (problem["routing"], uniform["routing"]) == ("few", "uniform")
    assert (problem["shape"]["e"], problem["rows_of_ranks"], problem["tokens_sent"]) == (4, [128, 0], 1.0)
    plain, ours = problem["bf16"], problem["variants"]
    assert [way["name"] for way in ours] == [
        "fp8moe BF16 dispatch", "fp8moe FP8 dispatch", "fp8moe FP8 dispatch, weights kept",
        "fp8moe FP8 dispatch, cached", "fp8moe FP8 dispatch, capacity",
    ]  # fmt: skip
    for way in ours:
        assert list(way["sqnr_db"]) == ["out", "d_hidden", "d_topk_weights", "d_w_gate_up", "d_w_down"]
        assert 21.5 < min(way["sqnr_db"].values()) < 40
        assert way["speed_against_bf16"] == pytest.approx(plain["both"]["median_ms"] / way["both"]["median_ms"])
        assert way["without_wire"]["min_ms"] > 0
    # All experts in use are on rank 0, which sends sums back, in backward with the gradients of two weights.
    row, counts = 2 * 128, 3 * 8
    assert ours[1]["sent_bytes"] == 32 * (row + row + 32) + counts
    assert plain["sent_bytes"] == 32 * 2 * 2 * row + 2 * 8
    wire = {each["name"]: each for each in problem["wire"]}
    assert wire["rows of all choices, bf16"]["sent_bytes"] == 32 * 2 * row
    assert wire["messages, FP8"]["sent_bytes"] == 32 * (128 + 32 + 32)  # codes, a scale, two choices
    assert wire["gather of gate-up, bf16"]["sent_bytes"] == 2 * 256 * 128 * 2
    assert len(problem["alone"]) == 2
    assert (tmp_path / "distributed.png").read_bytes().startswith(b"\x89PNG")
    assert plan([str(tmp_path / "distributed.json"), "--gpus", "4"]) == 0
    assert "(32,2,128,128,4): expert parallelism, predicted" in capsys.readouterr().out


def test_two_ranks_train_a_sharded_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    flags = ["--model", "tiny", "--layers", "1", "--batch", "2", "--length", "16", "--output", str(tmp_path)]
    assert "tiny (for a look at the command itself), 1 layers, FSDP2 over 2 ranks" in on_two_ranks(*flags)
    document = json.loads((tmp_path / "fsdp.json").read_text())
    bf16, ours, gathering_fp8 = document["results"]
    assert [result["name"] for result in (bf16, ours)] == ["BF16: grouped_mm, bf16 gather", "fp8moe, bf16 gather"]
    assert gathering_fp8["name"] == "fp8moe, FP8 gather"
    assert gathering_fp8["losses"] == pytest.approx(ours["losses"], rel=1e-3)
    assert ours["losses"][0] == pytest.approx(bf16["losses"][0], rel=1e-2)
    assert ours["losses"] != bf16["losses"]
    for result in document["results"]:
        assert result["losses"][1] < result["losses"][0]
        assert result["tokens_per_second"] == pytest.approx(32 / result["whole"]["median_ms"] * 1e3)
    assert "| fp8moe, bf16 gather |" in (tmp_path / "fsdp.md").read_text()


@pytest.mark.usefixtures("one_rank")
class TestOneRank:
    def site(self) -> Site:
        ranks = Ranks(CPU)
        return Site(ranks, TorchExchange(None), HostStopwatch(), BUDGET, BUDGET)

    def test_the_plain_layer_is_the_layer(self) -> None:
        problem = draw_rank_problem(SHAPE, Balance.SKEWED, Ranks(CPU)).problem
        actual = problem.products(plain_layer(TorchExchange(None)))
        for name, expected in problem.products(eager_layer(PLAIN)).items():
            assert sqnr(actual[name], expected) > 40, name

    @pytest.mark.filterwarnings("default")  # dynamo warns as it traces
    def test_a_compiler_takes_all_that_it_is_given(self) -> None:
        """Whole functions, with any number of rows."""
        compile_ = partial(torch.compile, fullgraph=True, backend="eager")
        problem = draw_rank_problem(SHAPE, Balance.UNIFORM, Ranks(CPU)).problem
        actual = problem.products(plain_layer(TorchExchange(None), compile_))
        for name, expected in problem.products(plain_layer(TorchExchange(None))).items():
            assert torch.equal(actual[name], expected), name

    def test_a_wrong_way_is_a_failure_and_the_others_are_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half(*arguments: Any, **options: Any) -> Tensor:
            return ep_moe_forward(*arguments, **options) * (0.5 if options.get("capacity") else 1)

        monkeypatch.setattr(ways_module, "ep_moe_forward", half)
        found = measure_shape(SHAPE, Balance.UNIFORM, self.site(), layers=True, wire=False)
        (failure,) = found.failures
        assert failure.name == "fp8moe FP8 dispatch, capacity"
        assert failure.is_ours
        assert "rank 0: WrongResultError: out is wrong" in failure.error
        assert len(found.variants) == 5
        assert found.bf16 is not None
        assert found.wire == []
        assert found.bf16.overlap is None

    def test_parts_can_be_left_out(self) -> None:
        found = measure_shape(SHAPE, Balance.UNIFORM, self.site(), layers=False, wire=True)
        assert (found.bf16, found.variants, found.alone) == (None, [], [])
        assert [each.sent_bytes for each in found.wire] == [0] * 5  # there is nobody else

    def test_experts_in_bf16_have_a_way_on_a_gpu_alone(self) -> None:
        drawn = draw_rank_problem(SHAPE, Balance.UNIFORM, Ranks(CPU))
        names = [[way.name for way in ways_of(SHAPE, drawn, torch.device(device))] for device in ("cpu", "cuda")]
        assert names[1] == [names[0][0], "BF16 tokens once", *names[0][1:]]

    def test_without_its_wire_a_step_computes_the_same(self) -> None:
        ranks, exchange = Ranks(CPU), TorchExchange(None)
        drawn = draw_rank_problem(SHAPE, Balance.UNIFORM, ranks)
        way = next(way for way in ways_of(SHAPE, drawn, CPU) if way.name == FP8_DISPATCH)
        recording = Recording(exchange, 0)
        expected = drawn.problem.products(way.over(recording))
        replay = Replay(recording)
        assert replay.num_ranks == 1
        drawn.problem.arguments["hidden"].data.zero_()  # what came is not what would come now
        for _ in range(2):
            actual = drawn.problem.products(way.over(replay))
            assert all(torch.equal(actual[name], expected[name]) for name in ("out", "d_hidden", "d_w_gate_up"))

    def test_rows_that_arrive_are_those_of_the_layer(self) -> None:
        ranks = Ranks(CPU)
        drawn = draw_rank_problem(SHAPE, Balance.SKEWED, ranks)
        arrived = draw_arrived_rows(SHAPE, drawn, ranks)
        assert arrived.arguments["rows"].shape == (40 * 3, 128)
        assert arrived.arguments["offs"].diff().tolist() == drawn.problem.group_sizes[1:]
        assert arrived.arguments["w_down"] is drawn.problem.arguments["w_down"]

    def test_plain_experts_without_rows_have_gradients_of_zeros(self) -> None:
        rows = torch.empty(0, 8, requires_grad=True)
        weights = torch.ones(2, 8, 8, requires_grad=True), torch.ones(2, 8, 4, requires_grad=True)
        out = plain_experts()(rows, *weights, torch.zeros(2, dtype=torch.int32))
        gradients = torch.autograd.grad(out, weights, torch.empty(0, 8))
        assert out.shape == (0, 8)
        assert [gradient.shape for gradient in gradients] == [weight.shape for weight in weights]
        assert not any(gradient.any() for gradient in gradients)

    def test_a_failure_anywhere_is_one_everywhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def gather(errors: list[str | None], mine: str | None) -> None:
            errors[:] = [mine, "it is broken", "it is broken too"]

        ranks = Ranks(CPU)
        assert ranks.first_error(None) is None
        assert ranks.first_error("no") == "rank 0: no"
        ranks.count = 3
        monkeypatch.setattr(dist, "all_gather_object", gather)
        assert ranks.first_error(None) == "rank 1: it is broken"

    def test_wire_sends_what_the_counts_say(self) -> None:
        drawn = RankProblem(Problem({}, torch.empty(0), []), torch.zeros(1, 40, 3, dtype=torch.int64), 6)
        wire = measure_wire(SHAPE, drawn, Ranks(CPU), TorchExchange(None), HostStopwatch(), BUDGET)
        assert [each.name for each in wire][::2] == [PLAIN_ROWS, FP8_ROWS, "gather of gate-up, FP8"]
        assert wire[0].speed_against_bf16 == 1.0


class TwoRanks:
    """Of which this is the first, and the other takes what it is told."""

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def gathered(self, mine: Tensor) -> Tensor:
        return torch.stack([mine, self.other])


class Fixed:
    def __init__(self, laps: list[tuple[float, ...]]) -> None:
        self._laps = laps

    def laps(self, stages: Stages, runs: int) -> list[tuple[float, ...]]:
        return self._laps[:runs]


def test_each_run_is_that_of_its_slowest_rank() -> None:
    other: Any = TwoRanks(torch.tensor([[2.0, 2.0], [1.0, 9.0]], dtype=torch.float64))
    stopwatch = SlowestRank(Fixed([(3.0, 2.0), (6.0, 1.0)]), other)
    assert stopwatch.laps([], 2) == [(3.0, 2.0), (1.0, 9.0)]


def test_a_meeting_comes_before_each_run() -> None:
    happened: list[str] = []
    HostStopwatch(meet=lambda: happened.append("meet")).laps([lambda: happened.append("run")], 2)
    assert happened == ["meet", "run"] * 2


def test_rows_sent_are_counted_by_choice_or_by_token() -> None:
    ids = torch.tensor([[[0, 1, 2], [3, 2, 1]], [[0, 1, 0], [3, 3, 2]]])  # of two ranks, with two experts each
    drawn = RankProblem(Problem({}, torch.empty(0), []), ids, 2)
    assert drawn.rows_sent(once=False).tolist() == [[3, 3], [3, 3]]
    assert drawn.rows_sent(once=True).tolist() == [[2, 2], [1, 1]]
    assert drawn.group_sizes(0) == [3, 3]
    assert drawn.group_sizes(1) == [3, 3]


def test_gradients_of_weighted_sums_are_those_of_autograd() -> None:
    choices = torch.tensor([[1, 0], [2, 1], [0, 2]])
    order = choices.flatten().argsort(stable=True)
    choice_row = torch.empty_like(order).scatter_(0, order, torch.arange(6)).view(3, 2)
    rows, weights = torch.randn(6, 8, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    d_out = torch.randn(3, 8)
    out = weighted_sums(rows, weights, choice_row, order // 2, order)
    expected = torch.autograd.grad(out, (rows, weights), d_out)
    actual = weighted_sums_backward(d_out, rows.detach(), weights.detach(), choice_row, order // 2, order)
    for one, other in zip(actual[:2], expected, strict=True):
        torch.testing.assert_close(one, other)


def test_shapes_by_the_number_of_ranks() -> None:
    assert default_shapes(on_cuda=False, num_ranks=2) == list(ON_CPU)
    assert len(default_shapes(on_cuda=True, num_ranks=2)) == 3
    assert [shape["E"] for shape in default_shapes(on_cuda=True, num_ranks=8)][-1] == 256
    with pytest.raises(
        ValueError, match="E of shape 40,3,128,128,6 is 6; it must be a multiple of the number of ranks"
    ):
        check_shape(SHAPE, 4)


def test_a_gather_takes_what_memory_holds() -> None:
    assert gathered_experts(layer_shape(4096, 8, 7168, 2048, 256), 8) == 32
    assert gathered_experts(layer_shape(4096, 8, 2048, 768, 128), 8) == 128
    assert gathered_experts(layer_shape(1, 1, 32768, 65536, 8), 4) == 4


@contextmanager
def launched(patch: pytest.MonkeyPatch, ranks: int = 2) -> Iterator[None]:
    with patch.context() as within:
        for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks}.items():
            within.setenv(name, str(value))
        within.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer"], "--distributed has its own layers"),
        (["--backend", "triton"], "--distributed has its own layers"),
        (["--shape", "64,2,128,128"], "shape is '64,2,128,128'; it must be integers T,k,H,I,E"),
        (
            ["--shape", "64,2,128,128,3"],
            "E of shape 64,2,128,128,3 is 3; it must be a multiple of the number of ranks, 2",
        ),
        (["--shape", "64,2,128,128,4", "--only", "tiny"], "--shape and --only are given"),
        (["--only", "qwen"], "--only 'qwen' is in no name"),
        (["--routing", "ragged"], "--routing 'ragged' is not one of uniform, skewed, few"),
        (["--model", "tiny", "--only", "tiny"], "--model has its own shapes"),
        (["--output", __file__], "File exists"),
    ],
)
def test_arguments_that_cannot_be_met(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--model" in flags:
        pytest.importorskip("transformers")
    with launched(monkeypatch):
        assert bench(*flags) == BAD_ARGUMENTS
    assert message in capsys.readouterr().err


def test_without_torchrun_the_error_says_how_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert bench() == BAD_ARGUMENTS
    assert "torchrun --nproc-per-node 2 -m fp8moe bench --distributed" in capsys.readouterr().err


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with launched(monkeypatch, ranks=4):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert bench() == BAD_ARGUMENTS
    assert "torchrun started 4 processes on a machine with 2 GPUs" in capsys.readouterr().err


def test_unknown_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("--parts", "layers,network")
    assert "'network' is not one of layers, wire" in capsys.readouterr().err
