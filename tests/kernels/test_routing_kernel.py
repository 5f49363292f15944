"""The kernels' routing equals that of `torch.sort`, which the tests hold to a plain loop."""

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from fp8moe.kernels import routing as kernels
from fp8moe.rows.routing import Routing, route_by_sort
from tests.generators import choices


def check(topk_ids: Tensor, num_experts: int) -> None:
    """Few choices are also routed as many are, in three launches."""
    topk_weights = torch.rand((len(topk_ids), topk_ids.shape[1] + 3), device=topk_ids.device)
    topk_weights = topk_weights[:, 3:] if topk_ids.stride(0) > topk_ids.shape[1] else topk_weights[:, 3:].contiguous()
    used = int(((topk_ids >= 0) & (topk_ids < num_experts)).sum())
    few = kernels.FEW
    for limit, weights in ((few, None), (few, topk_weights), (0, topk_weights)):
        if limit == 0 and topk_ids.numel() == 0:
            continue  # nothing to count
        expected = route_by_sort(topk_ids, weights, num_experts)
        routing = [torch.full_like(tensor, -7) for tensor in expected]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "FEW", limit)
            kernels.launch_route(topk_ids, weights, num_experts, routing)
            ends, choice_row = torch.full_like(expected[0], -7), torch.full_like(expected[6], -7)
            kernels.launch_route_choices(topk_ids, num_experts, ends, choice_row)
        assert torch.equal(ends, expected[0])
        assert torch.equal(choice_row, expected[6])
        for actual, tensor in zip(routing[:7], expected[:7], strict=True):
            assert torch.equal(actual, tensor)
        if weights is not None:
            assert torch.equal(routing[7][:used], expected[7][:used])


@given(drawn=choices())
@example(drawn=([], 3, 2))
@example(drawn=([[-1, 3], [3, -1]], 3, 2))
@example(drawn=([[1] * 64] * 4, 3, 64))
def test_equals_sort(device: torch.device, drawn: tuple[list[list[int]], int, int]) -> None:
    ids, num_experts, k = drawn
    drawn_ids = torch.tensor(ids, dtype=torch.int64, device=device).reshape(len(ids), k)
    check(drawn_ids, num_experts)
    between = torch.full((len(ids), 1), num_experts, device=device)
    check(torch.cat([drawn_ids, between], 1)[:, :k], num_experts)  # as they lie in messages


@pytest.mark.parametrize("num_choices", [127, 128, 129, 255, 256, 257, 1000])  # a program places 128
@pytest.mark.parametrize("num_experts", [1, 8])
def test_equals_sort_around_the_length_of_a_chunk(device: torch.device, num_choices: int, num_experts: int) -> None:
    check(torch.randint(-1, num_experts + 1, (num_choices, 1), device=device), num_experts)
    check(torch.full((1, num_choices), num_experts - 1, device=device), num_experts)


slow_to_interpret = pytest.mark.gpu


@pytest.mark.parametrize(
    ("num_experts", "num_tokens"),
    [
        pytest.param(128, 40, id="128 experts, three chunks of 128 choices"),
        pytest.param(129, 40, id="129 experts, two chunks of 256"),
        pytest.param(256, 70, id="256 experts, three chunks", marks=slow_to_interpret),
        pytest.param(1000, 400, id="1000 experts, four chunks of 1024", marks=slow_to_interpret),
        pytest.param(1024, 3, id="1024 experts, mostly empty"),
        pytest.param(1024, 9000, id="1024 experts, 71 chunks", marks=slow_to_interpret),
    ],
)
def test_equals_sort_at_many_experts(device: torch.device, num_experts: int, num_tokens: int) -> None:
    check(torch.randint(-1, num_experts + 1, (num_tokens, 8), device=device), num_experts)


@pytest.mark.parametrize("num_experts", [128, pytest.param(1024, marks=slow_to_interpret)])
def test_equals_sort_when_all_choose_the_last_of_many(device: torch.device, num_experts: int) -> None:
    check(torch.full((150, 2), num_experts - 1, device=device), num_experts)


def test_more_chunks_than_are_scanned_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.kernels.routing.COUNTS", 4)
    check(torch.randint(-1, 4, (1300, 1), device=device), 3)  # eleven chunks


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_equals_sort_in_any_integer_dtype(device: torch.device, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 20, (30, 3), device=device).to(dtype)
    ids[0] = torch.iinfo(dtype).max
    ids[1] = torch.iinfo(dtype).min
    check(ids, 9)


def test_every_byte_may_be_an_expert(device: torch.device) -> None:
    check(torch.tensor([[255, 0, 255], [7, 254, 255]], dtype=torch.uint8, device=device), 256)


def test_no_id_wraps_into_an_expert(device: torch.device) -> None:
    check(torch.tensor([[0, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63), 256, -1, 4, 1]], device=device), 4)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(65536, 256), (500_000, 128), (500_000, 1), (300_000, 1024)])
def test_equals_sort_at_millions_of_choices(num_tokens: int, num_experts: int) -> None:
    ids = torch.randint(-1, num_experts + 1, (num_tokens, 8), device="cuda")
    check(ids, num_experts)
    check(ids.clamp(max=num_experts // 3), num_experts)  # most on one expert


@pytest.mark.gpu
def test_reads_nothing_on_the_host_and_replays_other_choices() -> None:
    ids = torch.randint(-1, 65, (5000, 8), device="cuda")
    Routing.from_topk(ids, 64)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = Routing.from_topk(ids, 64)
    for _ in range(3):
        ids.copy_(torch.randint(-1, 65, ids.shape))
        graph.replay()
        for actual, expected in zip(routing.tensors, route_by_sort(ids, None, 64), strict=True):
            assert torch.equal(actual, expected)
