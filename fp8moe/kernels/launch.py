"""Launching a Triton kernel with little host time.

Triton binds, inspects and hashes every argument on every call, and looks at every global that the kernel reads. Where
a product takes a millisecond on the device, ten launches of that kind take longer on the host. Here the compiled kernel
is found by what it depends on, and nothing else.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_compiled: dict[int, dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]] = {}
"""For each kernel and each specialization: what Triton compiled, and the constants that follow the arguments."""


def launch(kernel: Any, blocks: int, *args: Any, **constants: Any) -> None:
    """`kernel[(blocks,)](*args, **constants)`, on the device of the first tensor.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`, defined once for the process.
        blocks: thread blocks, at least 1.
        args: its parameters that are no constants, in order: tensors, TMA descriptors, `int`s or None.
        constants: its constants and compilation options, by name.
    """
    if not isinstance(kernel, JITFunction):  # Triton interprets
        kernel[(blocks,)](*args, **constants)
        return
    device, specialization = _specialize(args)
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, blocks, *args, **constants)
        return
    key = (device, *specialization, *constants.items())
    known = _compiled.setdefault(id(kernel), {})
    found = known.get(key)
    if found is not None:
        compiled, trailing = found
        if _has_launch_hooks():
            compiled[(blocks, 1, 1)](*args, *trailing)
        else:
            _run(compiled, blocks, device, *args, *trailing)
        return
    for arg in args:
        if hasattr(arg, "block_shape"):
            arg.__post_init__()  # Triton's checks of a TMA descriptor
    compiled = kernel[(blocks,)](*args, **constants)
    if compiled is not None:
        known[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def _has_launch_hooks() -> bool:
    """Whether someone, such as a profiler, is to be told of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, or one, or None


def _run(compiled: Any, blocks: int, device: int | None, *args: Any) -> None:
    """`compiled[(blocks, 1, 1)](*args)` without hooks. Inductor launches this way too. Triton's own way takes twice as
    long: it describes the launch for hooks that are not there, and asks for the device again."""
    stream = driver.active.get_current_stream(device)
    compiled.run(blocks, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def ceil_div(dividend: int, divisor: int) -> int:
    """As `triton.cdiv`, which costs the host as much as a launch."""
    return -(-dividend // divisor)


def power_of_2_from(x: int) -> int:
    """The least power of two that is at least `x >= 1`, as `triton.next_power_of_2`."""
    return 1 << (x - 1).bit_length()


def _specialize(args: tuple[Any, ...]) -> tuple[int | None, list[Any]]:
    """The CUDA device of the first tensor (None on a CPU), and whatever of `args` Triton's compiler may depend on."""
    device = None
    found: list[Any] = []
    for arg in args:
        if type(arg) is int:
            found.append(16 if arg % 16 == 0 else arg == 1)
            if not -0x80000000 <= arg < 0x80000000:
                found.append(64)
        elif arg is None:
            found.append(None)
        else:
            if isinstance(arg, Tensor):
                tensor = arg
            else:
                tensor = arg.base  # of a TMA descriptor
                found.append(tuple(arg.block_shape))
            found.append(tensor.dtype)
            found.append(tensor.data_ptr() % 16 == 0)
            if device is None:
                device = tensor.get_device()
    return None if device == -1 else device, found
