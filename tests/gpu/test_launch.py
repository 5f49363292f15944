"""`launch` computes what Triton's own call computes, whatever its arguments are specialized for."""

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from fp8moe.kernels.launch import launch

pytestmark = pytest.mark.gpu


@triton.jit
def weighted_sum_kernel(x, y, out, factor, size, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    total = tl.load(x + index, mask=index < size, other=0.0).to(tl.float64) * factor + SHIFT
    if y is not None:
        total += tl.load(y + index, mask=index < size, other=0.0).to(tl.float64)
    tl.store(out + index, total, mask=index < size)


def test_every_specialization_is_its_own() -> None:
    """Alignment, ones, multiples of 16, 64-bit numbers, dtypes, missing tensors and constants, each twice, mixed."""
    buffer = torch.randn(200, device="cuda")
    choices = list(
        itertools.product(
            (torch.float32, torch.bfloat16), (0, 1), (None, 0, 3), (1, 16, 17, 2**31, 2**40), (1, 48, 77), (0, 1)
        )
    )
    for dtype, x_start, y_start, factor, size, shift in [*choices, *reversed(choices)]:
        x = buffer.to(dtype)[x_start : x_start + 77]
        y = None if y_start is None else buffer[y_start : y_start + 77]
        out = torch.full((77,), torch.nan, dtype=torch.float64, device="cuda")
        launch(weighted_sum_kernel, 1, x, y, out, factor, size, SHIFT=shift, BLOCK=128, num_warps=4)
        expected = x.double() * factor + shift + (0 if y is None else y.double())
        torch.testing.assert_close(out[:size], expected[:size], rtol=1e-12, atol=1e-12)
        assert out[size:].isnan().all()


def test_hooks_hear_of_every_launch() -> None:
    """As profilers set them: between launches, and taken away again."""
    heard: list[str] = []

    def enter(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    def leave(metadata: Any) -> None:
        heard.append("done")

    x = torch.randn(77, device="cuda")
    expected = x.double() * 2
    for hooks in ((), (enter,), (enter, leave), (leave,), ()):
        chains = [getattr(knobs.runtime, f"launch_{'enter' if hook is enter else 'exit'}_hook") for hook in hooks]
        heard.clear()
        for chain, hook in zip(chains, hooks, strict=True):
            chain.add(hook)
        try:
            for _ in range(2):
                out = torch.empty(77, dtype=torch.float64, device="cuda")
                launch(weighted_sum_kernel, 1, x, None, out, 2, 77, SHIFT=0, BLOCK=128)
                torch.testing.assert_close(out, expected)
        finally:
            for chain, hook in zip(chains, hooks, strict=True):
                chain.remove(hook)
        names = {enter: "weighted_sum_kernel", leave: "done"}
        assert heard == [names[hook] for hook in hooks] * 2


def test_launches_on_the_current_stream() -> None:
    x = torch.zeros(77, device="cuda")
    out = torch.full((77,), torch.nan, dtype=torch.float64, device="cuda")
    launch(weighted_sum_kernel, 1, x, None, out, 2, 77, SHIFT=0, BLOCK=128)  # compiled
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(3.0)
        launch(weighted_sum_kernel, 1, x, None, out, 2, 77, SHIFT=0, BLOCK=128)
    torch.cuda.synchronize()
    assert (out == 6.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_where_the_tensors_are() -> None:
    for device in (1, 0, 1):
        x = torch.randn(77, device=device)
        out = torch.empty(77, dtype=torch.float64, device=device)
        launch(weighted_sum_kernel, 1, x, None, out, 2, 77, SHIFT=0, BLOCK=128)
        torch.testing.assert_close(out, x.double() * 2)
    assert torch.cuda.current_device() == 0
