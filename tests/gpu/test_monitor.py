"""A monitor on a GPU: it never waits, changes no bit, and leaves graphs alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8moe import FP8Config, SwiGLUExperts
from fp8moe.monitor import Reading, watch
from tests.gpu.support import no_synchronization
from tests.measures import assert_same_bits

T, K, E, H, I = 300, 4, 6, 512, 384  # noqa: E741

pytestmark = pytest.mark.gpu


def layer(config: FP8Config) -> tuple[SwiGLUExperts, Callable[[], Tensor]]:
    """A layer, and a step of it: the output."""
    torch.manual_seed(0)
    experts = SwiGLUExperts(E, H, I, config=config, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, weights = torch.randint(E, (T, K), device="cuda"), torch.rand(T, K, device="cuda")
    dout = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        out: Tensor = experts(hidden, ids, weights)
        out.backward(dout)
        return out

    return experts, step


def test_nothing_waits_and_no_bit_changes(config: FP8Config) -> None:
    experts, step = layer(config)
    expected = step()
    experts.zero_grad()
    with watch(experts, every=2) as monitor:
        step()
        with no_synchronization():
            for _ in range(25):
                out = step()
                monitor.latest()
        assert_same_bits(out, expected)
        torch.cuda.synchronize()
        reading = monitor.latest()
        assert isinstance(reading, Reading)
        assert reading.step == 25
        (seen,) = reading.layers.values()
        assert len(seen.operands) == 10
        assert all(x.sqnr_db is not None and x.sqnr_db > 28 for x in seen.operands.values())
        assert sum(seen.tokens_per_expert) == T * K


def test_nan_on_the_device_is_found_in_its_step(config: FP8Config) -> None:
    experts, step = layer(config)
    monitor = watch(experts, every=100, warn=False)
    for number in range(1, 13):
        if number == 5:
            with torch.no_grad():
                experts.w_gate_up[2, 7, 300] = float("nan")
        step()
    reading = monitor.read()
    assert reading is not None
    assert str(reading.not_finite) == "SwiGLUExperts: output is NaN or infinite from step 5 on"
    monitor.close()


def test_a_step_that_is_captured_is_not_seen(config: FP8Config) -> None:
    experts, step = layer(config)
    step()
    side = torch.cuda.Stream()
    with watch(experts, every=1) as monitor:
        step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(3):
            graph.replay()
        reading = monitor.read()
        assert reading is not None
        assert reading.step == 2
