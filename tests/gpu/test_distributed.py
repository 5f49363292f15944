"""Expert parallelism on a GPU, with NCCL and one rank: the kernels, waits for the device, and graphs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, ScaleFormat
from fp8moe.distributed import Dispatch, ep_moe_forward
from tests.gpu.support import no_synchronization, poison_free_memory
from tests.gpu.test_moe import E, K, Layer, T, problem, step
from tests.measures import assert_same_bits, sqnr

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nccl")]


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("nccl") / "store"
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


def parallel(config: FP8Config, **options: Any) -> Layer:
    def layer(hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        return ep_moe_forward(hidden, ids, weights, w_gate_up, w_down, None, config=config, **options)

    return layer


@pytest.mark.parametrize("dispatch", Dispatch)
@pytest.mark.parametrize("room", [{}, {"capacity": T}, {"capacity": T, "max_rows": T * K - 7}], ids=str)
def test_one_rank_is_the_layer_itself(config: FP8Config, dispatch: Dispatch, room: dict[str, Any]) -> None:
    config = replace(config, scale_format=ScaleFormat.POW2)
    arguments = problem()
    arguments[1][:10] = -1  # so that less than `max_rows` choices are left
    dout = torch.randn_like(arguments[0])
    expected = step(lambda *args: fp8moe.moe_forward(*args, config=config), arguments, dout)
    poison_free_memory()
    actual = step(parallel(config, dispatch=dispatch, **room), arguments, dout)
    for mine, theirs in zip(actual[:3], expected[:3], strict=True):
        assert_same_bits(mine, theirs)
    for mine, theirs in zip(actual[3:], expected[3:], strict=True):
        assert sqnr(mine, theirs) >= 45


@pytest.mark.parametrize("dispatch", Dispatch)
def test_with_a_capacity_the_host_never_waits_and_a_graph_takes_any_routing(
    config: FP8Config, dispatch: Dispatch
) -> None:
    hidden, ids, *others = problem()
    dout, dropped = torch.randn_like(hidden), torch.zeros((), dtype=torch.int64, device="cuda")
    layer = parallel(config, dispatch=dispatch, capacity=T - 20, max_rows=T * K // 2, dropped=dropped)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(layer, (hidden, ids, *others), dout)  # compiles kernels
        with no_synchronization():
            step(layer, (hidden, ids, *others), dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Detached: what holds the graph of autograd holds nodes that belong to the stream of the capture.
        made = [x.detach() for x in step(layer, (hidden, ids, *others), dout)]
    ids.copy_(torch.randint_like(ids, E))
    poison_free_memory()
    dropped.zero_()
    graph.replay()
    of_graph = [x.clone() for x in (*made, dropped)]
    dropped.zero_()
    expected = step(layer, (hidden, ids, *others), dout)
    for mine, theirs in zip(of_graph, (*expected, dropped), strict=True):
        assert_same_bits(mine, theirs)
        assert theirs.any()
    assert dropped >= T * K - T * K // 2


def test_without_one_the_host_reads_the_counts_alone(config: FP8Config) -> None:
    """An event tells when they are there, not the stream that has more to do."""
    arguments = problem()
    dout = torch.randn_like(arguments[0])
    step(parallel(config), arguments, dout)
    with no_synchronization():
        step(parallel(config), arguments, dout)


def test_a_dead_token_is_not_read(config: FP8Config) -> None:
    hidden, ids, *others = problem()
    ids[4] = -1
    with torch.no_grad():
        hidden[4] = torch.nan
    out, d_hidden, *_ = step(parallel(config), (hidden, ids, *others), torch.randn_like(hidden))
    assert (out[4] == 0).all()
    assert (d_hidden[4] == 0).all()
    assert out.isfinite().all()
