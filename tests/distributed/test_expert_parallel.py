"""`ep_moe_forward` on several ranks, against `moe_forward` in one process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.multiprocessing.spawn import spawn

import fp8moe
from fp8moe.distributed import Dispatch, ExpertParallelExperts, ep_moe_forward, exclude_from_ddp, plan
from tests.distributed.all_cases import CASES
from tests.distributed.problems import OF_TOKENS, POW2, Problem, anything, in_one_process, in_parallel
from tests.distributed.ranks import failures_of, lose_a_rank
from tests.measures import assert_same_bits, sqnr

Failures = Callable[[int], list[dict[str, str]]]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """What failed on each rank, of as many ranks."""

    @cache
    def of(count: int) -> list[dict[str, str]]:
        return failures_of(count, tmp_path_factory.mktemp("ranks"))

    return of


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks(failures: Failures, count: int, case: str) -> None:
    for rank, failed in enumerate(failures(count)):
        assert case not in failed, f"on rank {rank}: {failed[case]}"


def test_a_rank_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """Within the group's timeout of five seconds: nothing else would end this test."""
    spawn(lose_a_rank, (2, str(tmp_path)), nprocs=2)
    message = torch.load(tmp_path / "lost")
    assert "onnection" in message or "imed out" in message


@pytest.mark.usefixtures("one_rank")
class TestOneRank:
    @pytest.mark.parametrize("dispatch", Dispatch)
    @pytest.mark.parametrize("options", [{}, {"capacity": 50}], ids=str)
    def test_is_the_layer_itself(self, dispatch: Dispatch, options: dict[str, Any]) -> None:
        """One row comes back for each token, rounded to bf16."""
        problem = Problem.draw([50], 5, 3, anything, dtype=torch.bfloat16)
        actual = in_parallel(problem, 0, dist.group.WORLD, dispatch=dispatch, **options)
        for name, expected in in_one_process(problem, 0).items():
            if name in OF_TOKENS:
                assert_same_bits(actual[name], expected)
            else:  # of as many tokens, but in a matrix of other strides
                assert sqnr(actual[name], expected) > 50

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"group": 3}, TypeError, r"group is a int; it must be a torch\.distributed\.ProcessGroup"),
            ({"group": dist.GroupMember.NON_GROUP_MEMBER}, ValueError, "group does not have this process"),
            ({"dispatch": "fp8"}, TypeError, r"dispatch is 'fp8'; it must be a fp8moe\.distributed\.Dispatch"),
            ({"capacity": 0}, ValueError, "capacity is 0; it must be at least 1"),
            ({"capacity": 2.0}, TypeError, r"capacity is 2\.0; it must be an int"),
            ({"capacity": True}, TypeError, r"capacity is True; it must be an int"),
            ({"dropped": torch.zeros((), dtype=torch.int64)}, ValueError, "dropped is given without a capacity"),
            ({"max_rows": 9}, ValueError, "max_rows is given without a capacity"),
            ({"capacity": 1, "max_rows": -1}, ValueError, "max_rows is -1; it must be at least 1"),
            ({"capacity": 1, "max_rows": "9"}, TypeError, "max_rows is '9'; it must be an int or None"),
            ({"capacity": 1, "dropped": 0}, TypeError, r"dropped is 0; it must be an int64 tensor of no dimensions"),
            ({"capacity": 1, "dropped": torch.zeros(())}, TypeError, r"dropped is tensor.*must be an int64 tensor"),
            ({"biases": (None, torch.zeros(2, 64))}, ValueError, r"biases\[1\] has shape"),
            ({"topk_ids": torch.zeros(3, 2)}, TypeError, r"topk_ids has dtype torch\.float32"),
            ({"hidden": torch.zeros(3, 64)}, ValueError, "hidden has shape"),
            ({"config": None}, TypeError, "config is None; it must be an FP8Config"),
            ({"gate": "swiglu"}, TypeError, "gate is 'swiglu'"),
        ],
        ids=str,
    )
    def test_errors_name_the_argument(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments = {
            "hidden": torch.randn(3, 128), "topk_ids": torch.zeros(3, 2, dtype=torch.int64),
            "topk_weights": torch.rand(3, 2), "w_gate_up": torch.randn(2, 256, 128), "w_down": torch.randn(2, 128, 128),
            "group": dist.group.WORLD,
        }  # fmt: skip
        with pytest.raises(error, match=message):
            ep_moe_forward(**{**arguments, **options})

    def test_it_is_no_part_of_one_graph(self) -> None:
        module = ExpertParallelExperts(3, 128, 128, dist.group.WORLD, config=POW2)
        arguments = torch.randn(5, 128), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
        torch.compiler.reset()
        with pytest.raises(Exception, match="between two graphs: compile without fullgraph=True"):
            torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)

    def test_a_module_on_one_rank(self) -> None:
        alone = fp8moe.SwiGLUExperts(3, 128, 128, config=POW2)
        module = ExpertParallelExperts(3, 128, 128, dist.group.WORLD, config=POW2)
        module.load_state_dict(alone.state_dict())
        hidden, ids = torch.randn(20, 128, dtype=torch.bfloat16), torch.randint(3, (20, 2))
        weights = torch.rand(20, 2)
        assert_same_bits(module(hidden, ids, weights), alone(hidden, ids, weights))


class OwnExchange:
    """A transport of one's own, which can send to one rank. What arrives lies in the midst of other memory."""

    def __init__(self, num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self.sent: list[StorageWeakRef] = []
        self.in_memory: list[list[int]] = []
        """For each `send`: which of those before it still have the memory of what they sent."""

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> "OwnArrival":
        assert [*sent] == [*received] == [len(x)]
        self.in_memory.append([number for number, storage in enumerate(self.sent) if not storage.expired()])
        self.sent.append(StorageWeakRef(x.untyped_storage()))
        around = torch.full((len(x) + 2, x.shape[1]), 3, dtype=x.dtype)
        around[1:-1] = x
        return OwnArrival(around[1:-1])


@dataclass
class OwnArrival:
    x: Tensor

    def wait(self) -> Tensor:
        return self.x


@pytest.mark.parametrize("dispatch", Dispatch)
@pytest.mark.parametrize("options", [{}, {"capacity": 50}], ids=str)
class TestAnotherTransport:
    def test_what_arrives_may_lie_anywhere(self, dispatch: Dispatch, options: dict[str, Any]) -> None:
        problem = Problem.draw([50], 5, 3, anything, dtype=torch.bfloat16)
        actual = in_parallel(problem, 0, OwnExchange(), dispatch=dispatch, **options)
        expected = in_one_process(problem, 0)
        for name in OF_TOKENS:
            assert_same_bits(actual[name], expected[name])

    def test_what_was_sent_is_not_kept(self, dispatch: Dispatch, options: dict[str, Any]) -> None:
        exchange = OwnExchange()
        in_parallel(Problem.draw([50], 5, 3), 0, exchange, dispatch=dispatch, **options)
        messages = 0 if options else 1  # without a capacity their number is sent first
        assert messages not in exchange.in_memory[messages + 1]  # when what the experts return is sent


def test_messages_that_cannot_be_numbered_are_refused() -> None:
    """Before anything is sent. A rank gets 64 messages of each token at most, with 64 choices each."""
    num_tokens, k, exchange = 2**20, 64, OwnExchange(num_ranks=64)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    arguments = torch.zeros(num_tokens, 1), ids.expand(num_tokens, k), weights.expand(num_tokens, k)
    with pytest.raises(ValueError, match=r"there are 4294967296 rows.*split the batch"):
        ep_moe_forward(*arguments, torch.zeros(1, 2, 1), torch.zeros(1, 1, 1), exchange)
    assert not exchange.sent


def test_a_graph_needs_a_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "is_being_captured", lambda x: True)
    problem, exchange = Problem.draw([50], 5, 3), OwnExchange()
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured, and has no capacity.*pass capacity"):
        in_parallel(problem, 0, exchange)
    assert not exchange.sent
    in_parallel(problem, 0, exchange, capacity=50)


def test_nothing_is_dropped_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`to_empty` leaves in memory whatever was there."""
    module = torch.nn.Sequential(ExpertParallelExperts(4, 8, 8, OwnExchange(), capacity=3, device="meta"))
    monkeypatch.setattr(torch, "empty_like", lambda x, device: torch.full(x.shape, 7, dtype=x.dtype, device=device))
    experts: Any = module.to_empty(device="cpu")[0]
    assert experts.dropped == 0
    experts.dropped.fill_(3)
    assert experts.to(torch.float64).dropped == 3


class TestExcludeFromDdp:
    def test_experts_that_are_used_twice_are_divided_once(self) -> None:
        experts = ExpertParallelExperts(4, 8, 8, OwnExchange(num_ranks=2))
        other = ExpertParallelExperts(4, 8, 8, experts.exchange)
        other.w_down = experts.w_down
        exclude_from_ddp(torch.nn.ModuleList([experts, other]))
        (experts.w_down.sum() + experts.w_gate_up.sum() + other.w_gate_up.sum()).backward()
        for parameter in (experts.w_down, experts.w_gate_up, other.w_gate_up):
            assert parameter.grad is not None
            assert (parameter.grad == 0.5).all()

    def test_experts_on_the_meta_device_are_refused(self) -> None:
        """`to_empty` makes other parameters, which would not be divided."""
        model = torch.nn.Sequential(ExpertParallelExperts(4, 8, 8, OwnExchange(), device="meta"))
        with pytest.raises(ValueError, match=r"0\.w_gate_up is on the meta device: call exclude_from_ddp after"):
            exclude_from_ddp(model)
        exclude_from_ddp(model.to_empty(device="cpu"))


def test_without_process_groups() -> None:
    with pytest.raises(ValueError, match=r"group is None, .* call torch\.distributed\.init_process_group first"):
        ExpertParallelExperts(2, 128, 128, None)
