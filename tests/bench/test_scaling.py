"""Plans for more GPUs: they repeat what was measured, and follow the sizes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8moe.bench.distributed.calibration import Calibration, Line, MeasuredStep
from fp8moe.bench.distributed.comparison import Comparison, compare
from fp8moe.bench.distributed.scaling import (
    Machines,
    ep_sizes,
    expert_parallel_plans,
    main,
    plan_expert_parallel,
    plan_sharded,
    step_flops,
)
from fp8moe.bench.shapes import layer_shape
from fp8moe.distributed import Dispatch
from fp8moe.gemm.cost import Cost, Costs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOUR, EIGHT = RESULTS / "four-h200", RESULTS / "eight-h200"
SHAPE = layer_shape(1000, 2, 256, 128, 16, "a layer, 16 experts")
COSTS = Costs(Cost(0, 0, 2e-3, 2e-5), Cost(0, 0, 3e-3, 1e-5), Cost(0, 0, 1e-3, 1e-5))
QUIET = Machines(peer_us=0.0, network_gbit_s=80.0, network_share=1.0)
"""10 GB/s, one tenth of NVLink's below."""


def calibration(**changed: Any) -> Calibration:
    """Measured on two ranks with 8 experts each, at 100 GB/s."""
    made = Calibration(
        shape=SHAPE,
        measured_ranks=2,
        measured_experts=8,
        costs=COSTS,
        steps={None: MeasuredStep(40.0, 30.0, None), Dispatch.FP8: MeasuredStep(20.0, 15.0, None)},
        rows=Line(0.0, 100.0),
        gather_gb_s={False: 100.0, True: 100.0},
        host_ms=0.0,
    )
    return replace(made, **changed)


@pytest.mark.parametrize(("dispatch", "both_ms"), [(None, 40.0), (Dispatch.FP8, 20.0)])
def test_the_measured_ranks_take_what_was_measured(dispatch: Dispatch | None, both_ms: float) -> None:
    plan = plan_expert_parallel(calibration(), QUIET, 2, 2, dispatch)
    assert plan.step_ms == pytest.approx(both_ms)
    assert plan.far_bytes == plan.gradient_ms == 0.0
    assert plan.waiting_ms > 4


def test_what_was_not_measured_is_like_fp8_dispatch_but_for_its_bytes() -> None:
    bf16, fp8 = (plan_expert_parallel(calibration(), QUIET, 2, 2, each) for each in (Dispatch.BF16, Dispatch.FP8))
    assert (bf16.local_ms, bf16.waiting_ms) == (fp8.local_ms, fp8.waiting_ms)
    assert bf16.near_bytes > 1.2 * fp8.near_bytes


def test_the_wire_of_one_node_by_hand() -> None:
    plan = plan_expert_parallel(calibration().with_experts(4), QUIET, 4, 4, Dispatch.FP8)
    assert plan.visited == pytest.approx(2.0)  # one expert a rank: each choice is elsewhere
    away = 1000 * 2 * 3 / 4
    tokens, gradients, back = 256 + 32 + 32, 256 + 32, 512 + 512 + 32
    assert plan.near_bytes == pytest.approx(away * (tokens + gradients + back))
    assert plan.wire_ms == pytest.approx(away * (tokens + gradients + back) / 100 / 1e6)
    assert plan.rows_an_expert == 1000 * 2 / 1


def test_each_exchange_takes_a_time_of_its_own_and_more_with_further_peers() -> None:
    slow_start = calibration(rows=Line(0.5, 100.0))
    free, paid, of_peers = (
        plan_expert_parallel(one, machines, 8, 8, Dispatch.BF16).wire_ms
        for one, machines in ((calibration(), QUIET), (slow_start, QUIET), (slow_start, replace(QUIET, peer_us=10.0)))
    )
    exchanges = 5  # the gradients of the router's weights have their own
    assert paid - free == pytest.approx(exchanges * 0.5)
    assert of_peers - paid == pytest.approx(exchanges * (8 - 2) * 10.0 / 1e3)  # two ranks were measured


def test_a_line_through_what_exchanges_took() -> None:
    line = Line.through([(1e9, 12.0), (2e9, 22.0), (3e9, 32.0)])
    assert (line.fixed_ms, line.gb_s) == pytest.approx((2.0, 100.0))


@pytest.mark.parametrize("times", [(9.0, 21.0), (2.0, 1.0)], ids=["begins before 0", "falls"])
def test_a_line_that_cannot_be_goes_through_the_origin(times: tuple[float, float]) -> None:
    line = Line.through([(1e9, times[0]), (2e9, times[1])])
    assert (line.fixed_ms, line.gb_s) == pytest.approx((0.0, 5e3 / (times[0] + 2 * times[1])))


def test_no_line_where_nothing_travels() -> None:
    with pytest.raises(ValueError, match="nothing travelled"):
        Line.through([(0, 0.1), (0, 0.2)])


def test_between_nodes_the_network_sets_the_pace() -> None:
    within, between = (
        plan_expert_parallel(calibration(), replace(QUIET, per_node=size), 8, 8, Dispatch.FP8) for size in (8, 2)
    )
    assert between.near_bytes + between.far_bytes == pytest.approx(within.near_bytes)
    assert between.far_bytes == pytest.approx(within.near_bytes * 6 / 7)
    assert between.wire_ms == pytest.approx(between.far_bytes / 10 / 1e6)


def test_relays_and_node_limits_spare_the_network() -> None:
    machines = replace(QUIET, per_node=4)
    one = calibration(shape=layer_shape(1000, 6, 256, 128, 64))
    to_ranks, relayed, limited = (
        plan_expert_parallel(one, each, 16, 16, Dispatch.FP8)
        for each in (machines, replace(machines, relay=True), replace(machines, node_limit=2))
    )
    assert relayed.far_bytes / to_ranks.far_bytes == pytest.approx(to_ranks.visited_nodes / to_ranks.visited)
    assert relayed.near_bytes == pytest.approx(to_ranks.near_bytes + to_ranks.far_bytes)
    assert limited.visited_nodes < to_ranks.visited_nodes
    assert limited.far_bytes < to_ranks.far_bytes


def test_the_plain_layer_sends_every_choice() -> None:
    plan = plan_expert_parallel(calibration(), replace(QUIET, per_node=2), 8, 8, None)
    assert plan.near_bytes == pytest.approx(1000 * 2 * 1 / 8 * 4 * 512)
    assert plan.far_bytes == pytest.approx(1000 * 2 * 6 / 8 * 4 * 512)


def test_fewer_experts_a_rank_cost_less_and_replicas_reduce_gradients() -> None:
    eight, sixteen = (plan_expert_parallel(calibration(), QUIET, 16, ep, Dispatch.FP8) for ep in (8, 16))
    assert sixteen.local_ms < eight.local_ms < 15.0
    weights = 3 * 256 * 128 * 2  # of two experts, in bytes for one
    assert eight.gradient_ms == pytest.approx(2 * 2 * weights * (1 / 2) / 10 / 1e6)
    assert sixteen.gradient_ms == 0.0
    assert eight.bound_ms < eight.step_ms


def test_local_time_changes_as_much_as_the_cost_model_says_and_with_the_ranks_a_token_visits() -> None:
    one = calibration()
    times = {
        (dispatch, experts, visited): one.local_ms(dispatch, experts, visited)
        for dispatch in (None, Dispatch.FP8) for experts in (8, 2) for visited in (1.0, 3.0)
    }  # fmt: skip
    elements = 3 * 256 * 128  # of an expert's weights; the costs are microseconds for each
    assert times[None, 8, 1.0] - times[None, 2, 1.0] == pytest.approx(6 * elements * COSTS.bf16.weight / 1e3)
    assert times[Dispatch.FP8, 8, 1.0] - times[Dispatch.FP8, 2, 1.0] == pytest.approx(
        6 * elements * COSTS.fp8.weight / 1e3
    )
    # 3 ps for each of 1000 tokens' 256 features and each rank; choices of the plain layer travel one by one.
    assert times[Dispatch.FP8, 8, 3.0] - times[Dispatch.FP8, 8, 1.0] == pytest.approx(2 * 1000 * 256 * 3.0e-9)
    assert times[None, 8, 3.0] == times[None, 8, 1.0]


def test_what_the_measured_step_hid_is_hidden_and_no_more_where_the_wire_takes_longer() -> None:
    wire_ms = plan_expert_parallel(calibration(), QUIET, 2, 2, Dispatch.FP8).wire_ms
    hiding = calibration(steps={Dispatch.FP8: MeasuredStep(15.0 + 0.25 * wire_ms, 15.0, None)})
    within = plan_expert_parallel(hiding, QUIET, 8, 8, Dispatch.FP8)
    assert within.hidden_ms == pytest.approx(0.75 * wire_ms)
    assert within.waiting_ms == 0.0
    assert within.step_ms == pytest.approx(within.local_ms + within.wire_ms - 0.75 * wire_ms)
    slow = plan_expert_parallel(hiding, replace(QUIET, per_node=2, network_gbit_s=0.1), 8, 8, Dispatch.FP8)
    assert slow.wire_ms > 4 * slow.local_ms
    assert slow.step_ms == pytest.approx(slow.local_ms + slow.wire_ms - 0.75 * wire_ms)


def test_no_more_is_hidden_than_travels_and_no_step_is_below_its_bound() -> None:
    hiding = calibration(steps={Dispatch.FP8: MeasuredStep(14.0, 15.0, None)})
    measured = plan_expert_parallel(hiding, QUIET, 2, 2, Dispatch.FP8)
    assert measured.hidden_ms == measured.wire_ms > 0
    alone = plan_expert_parallel(hiding, QUIET, 1, 1, Dispatch.FP8)
    assert alone.wire_ms == 0.0
    assert alone.step_ms == alone.bound_ms == alone.local_ms


def test_a_slow_host_sets_the_pace_until_the_device_takes_longer() -> None:
    slow = calibration(host_ms=100.0)
    plan = plan_expert_parallel(slow, QUIET, 2, 2, Dispatch.FP8)
    assert plan.step_ms == pytest.approx(100.0)
    # Such a step says nothing of what the device hides: all of the wire counts, and the host runs meanwhile.
    assert (plan.hidden_ms, plan.waiting_ms) == (0.0, 0.0)
    far = plan_expert_parallel(slow, replace(QUIET, per_node=2, network_gbit_s=0.1), 8, 8, Dispatch.FP8)
    assert far.wire_ms > 100.0
    assert far.step_ms == pytest.approx(far.local_ms + far.wire_ms)


def test_fp8_gathers_take_half_and_need_no_quantization() -> None:
    bf16, fp8_weights, fp8 = (
        plan_sharded(calibration(), QUIET, 8, in_fp8=in_fp8, gathered_in_fp8=gathered)
        for in_fp8, gathered in ((False, False), (True, False), (True, True))
    )
    elements = 3 * 256 * 128 * 16
    assert bf16.gather_bytes == 2 * elements
    assert bf16.gather_ms == pytest.approx(2 * elements * 7 / 8 / 100 / 1e6)
    assert fp8.gather_ms / bf16.gather_ms == pytest.approx(0.5, rel=1e-3)
    assert fp8.reduce_ms == bf16.reduce_ms == bf16.gather_ms
    assert fp8.compute_ms < fp8_weights.compute_ms
    assert fp8.step_ms == pytest.approx(fp8.compute_ms + 2 * fp8.gather_ms + fp8.reduce_ms)


def test_as_many_tokens_as_hide_the_gathers() -> None:
    plan = plan_sharded(calibration(), replace(QUIET, network_gbit_s=0.8), 64, in_fp8=True, gathered_in_fp8=False)
    assert plan.tokens_to_hide > 1000
    long = calibration(shape=layer_shape(round(plan.tokens_to_hide), 2, 256, 128, 16))
    enough = plan_sharded(long, replace(QUIET, network_gbit_s=0.8), 64, in_fp8=True, gathered_in_fp8=False)
    assert enough.compute_ms == pytest.approx(2 * enough.gather_ms + enough.reduce_ms, rel=1e-2)


def test_experts_lie_over_as_many_ranks_as_there_are() -> None:
    assert ep_sizes(SHAPE, 4) == [4]
    assert ep_sizes(SHAPE, 8) == [8]
    assert ep_sizes(SHAPE, 1024) == [8, 16]
    assert ep_sizes(layer_shape(8, 8, 128, 128, 256), 1024) == [8, 64, 256]
    assert len(expert_parallel_plans(calibration(), QUIET, [8, 64])) == 3 * 3


def test_flops_of_a_step() -> None:
    assert step_flops(SHAPE) == 3 * 2 * 1000 * 2 * (256 * 256 + 128 * 256)


def test_the_command_prints_a_plan_for_each_shape(capsys: pytest.CaptureFixture[str]) -> None:
    file = RESULTS / "two-h200" / "distributed.json"
    assert main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "like DeepSeek-V3, 32 experts (4096,8,7168,2048,32): expert parallelism, predicted" in printed
    assert "Qwen3-30B-A3B (8192,8,2048,768,128): FSDP2 over all GPUs, predicted" in printed
    assert "42.5 GB/s a GPU between them" in printed
    assert main([str(file), "--only", "DEEP", "--experts", "256", "--gpus", "64", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| 64 | 64 | FP8 dispatch | 8,192 | 7.68 | 5.29 |" in printed
    assert "Qwen3" not in printed


def test_a_graph_tells_what_the_device_takes() -> None:
    document = json.loads((RESULTS / "two-h200" / "distributed.json").read_text())
    problem = document["problems"][0]
    way = next(way for way in problem["variants"] if way["graph_without_wire"])
    problem["tokens_sent"] = 2.0  # to every rank: no message of a capacity is empty

    def local(**graphs: dict[str, float] | None) -> dict[Dispatch | None, float]:
        way.update(graphs)
        return {dispatch: step.local_ms for dispatch, step in Calibration.of(document, problem).steps.items()}

    eager = local(graph=None, graph_without_wire=None)
    assert eager[Dispatch.FP8] > 2.0
    # The plain layer has no graph: the host reads its sizes.
    once = {None: eager[None], Dispatch.FP8: 1.0, Dispatch.BF16: 1.0}
    assert local(graph={"median_ms": 2.0}, graph_without_wire={"median_ms": 1.0}) == once
    # What takes longer without the wire than with it was disturbed.
    assert local(graph={"median_ms": 1.0}, graph_without_wire={"median_ms": 2.0}) == once


def test_empty_messages_of_a_capacity_are_not_local_time() -> None:
    document = json.loads((EIGHT / "distributed.json").read_text())
    problem = document["problems"][0]
    way = next(way for way in problem["variants"] if way["graph_without_wire"])
    assert problem["tokens_sent"] == pytest.approx(5.63, abs=0.01)  # of eight ranks
    step = Calibration.of(document, problem).steps[Dispatch.FP8]
    empty_ms = (8 - problem["tokens_sent"]) * 4096 * 7168 * 3.0e-9
    assert step.local_ms == pytest.approx(way["graph_without_wire"]["median_ms"] - empty_ms)


def compared(source: Path, *targets: Path) -> list[Comparison]:
    calibrations = Calibration.all_of(json.loads(source.read_text()))
    return [each for target in targets for each in compare(calibrations, json.loads(target.read_text()), Machines())]


def test_four_ranks_are_predicted_from_two() -> None:
    found = compared(
        FOUR / "distributed-two-ranks.json", FOUR / "distributed.json", FOUR / "distributed-256-experts.json"
    )
    assert len(found) == 4 * 3
    assert {each.plan.ep for each in found} == {4}
    for each in found:
        assert each.measured.wire_ms is not None
        assert each.plan.local_ms == pytest.approx(each.measured.local_ms, rel=0.06)
        assert each.plan.wire_ms == pytest.approx(each.measured.wire_ms, rel=0.08)
        assert abs(each.error) < 0.08


@pytest.mark.parametrize("ranks", ["-two-ranks", ""])
def test_eight_ranks_of_another_host_are_predicted_from_two_and_four(ranks: str) -> None:
    found = compared(
        FOUR / f"distributed{ranks}.json", EIGHT / "distributed.json", EIGHT / "distributed-256-experts.json"
    )
    assert len(found) == 3 * 3
    assert {each.plan.ep for each in found} == {8}
    for each in found:
        assert each.measured.wire_ms is not None
        # The plain layer's products take longer on the slowest of eight GPUs than on that of four.
        local_error = 0.09 if each.plan.dispatch is None else 0.04
        assert each.plan.local_ms == pytest.approx(each.measured.local_ms, rel=local_error)
        assert each.plan.wire_ms == pytest.approx(each.measured.wire_ms, rel=0.09)
        assert abs(each.error) < 0.05


def test_a_run_is_predicted_by_itself() -> None:
    for each in (pair for folder in (FOUR, EIGHT) for pair in compared(*[folder / "distributed.json"] * 2)):
        assert each.plan.local_ms == pytest.approx(each.measured.local_ms)
        assert abs(each.error) < 0.06  # where the host alone took longer than the step with another way


def test_other_routings_and_sizes_are_not_compared() -> None:
    document = json.loads((FOUR / "distributed-two-ranks.json").read_text())
    deepseek, _, qwen = (Calibration.of(document, problem) for problem in document["problems"])
    skewed, four = (json.loads((FOUR / f"distributed{name}.json").read_text()) for name in ("-skewed", ""))
    assert compare([deepseek], skewed, Machines()) == []
    assert [each.shape["E"] for each in compare([qwen], four, Machines())] == [128] * 3


def test_the_command_compares(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(FOUR / f"distributed{name}.json") for name in ("-two-ranks", "-one-rank", "")]
    assert main([runs[0], "--against", *runs[1:], "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| layer (T, k, H, I, E) | dispatch | ranks | ranks a token | local predicted | local measured |" in printed
    assert printed.count("| (4096, 8, 7168, 2048, 64) | FP8 dispatch | ") == 2
    assert "expert parallelism, predicted" not in printed
    assert main([str(FOUR / "distributed-one-rank.json")]) == 2
    assert "nothing travelled: measure on two ranks or more" in capsys.readouterr().err


def test_skewed_layers_are_no_calibration() -> None:
    uniform, skewed = (json.loads((FOUR / f"distributed{name}.json").read_text()) for name in ("", "-skewed"))
    both = uniform | {"problems": [*skewed["problems"], *uniform["problems"]]}
    assert Calibration.all_of(both) == Calibration.all_of(uniform)
    assert len(Calibration.all_of(both)) == 3
    with pytest.raises(ValueError, match="no layer with uniform routing"):
        Calibration.all_of(skewed)


def test_the_command_names_the_run_that_cannot_be_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, good = (str(FOUR / f"distributed{name}.json") for name in ("-two-ranks", ""))
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text("text")
    for bad in ("empty.json", "text.json", "none.json"):
        assert main([source, "--against", good, str(tmp_path / bad)]) == 2
        printed = capsys.readouterr().err
        assert f"error: {tmp_path / bad}: " in printed
        assert source not in printed
    with pytest.raises(SystemExit):
        main([source, "--against", good, "--experts", "64"])
    assert "--experts is for plans" in capsys.readouterr().err


def test_what_cannot_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    document = json.loads((RESULTS / "two-h200" / "distributed.json").read_text())
    for problem in document["problems"]:
        problem["wire"] = []
    (tmp_path / "layers.json").write_text(json.dumps(document))
    assert main([str(tmp_path / "layers.json")]) == 2
    assert "measure both parts" in capsys.readouterr().err
    assert main([str(RESULTS / "two-h200" / "distributed.json"), "--experts", "100"]) == 2
    with pytest.raises(SystemExit):
        main(["file", "--gpus", "some"])
