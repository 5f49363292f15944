"""`launch` hands a compiled kernel to the device as Triton's own call does, in the Triton that is installed."""

from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs
from triton.compiler import compiler

from fp8moe.kernels import launch

STREAM, FUNCTION, PACKED = 7, 8, (1, 2, 3)


class Recorded(compiler.CompiledKernel):  # type: ignore[misc]
    """Already loaded; tells what it would be run with."""

    name, function, packed_metadata, src = "kernel", FUNCTION, PACKED, None

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def _init_handles(self) -> None:
        pass

    def __del__(self) -> None:  # there is nothing to unload
        pass

    @property
    def run(self) -> Any:
        return lambda *args: self.runs.append(args)


def test_a_kernel_is_run_with_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: STREAM + device)
    for module in (launch, compiler):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=device))
    kernel = Recorded()
    args = (object(), 5, None, "constant")
    kernel[(11, 1, 1)](*args)
    launch._run(kernel, 11, 3, *args)
    theirs, ours = kernel.runs
    # Behind the packed metadata: what describes the launch to hooks, and the hooks, of which ours has none.
    assert ours[:6] == theirs[:6] == (11, 1, 1, STREAM + 3, FUNCTION, PACKED)
    assert ours[6:9] == (None, None, None)
    assert ours[9:] == theirs[9:] == args


def test_hooks_are_seen_and_their_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch._has_launch_hooks()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, SimpleNamespace(calls=[print]))
            assert launch._has_launch_hooks()
            patch.setattr(knobs.runtime, name, print)
            assert launch._has_launch_hooks()
            patch.setattr(knobs.runtime, name, None)
            assert not launch._has_launch_hooks()
