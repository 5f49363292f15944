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


class Variant:
    """A kernel with its constants. Launchers that keep theirs spare `launch` the search for it."""

    def __init__(self, kernel: Any, **constants: Any) -> None:
        """As in `launch`."""
        self.kernel, self.constants = kernel, constants
        self.is_interpreted = not isinstance(kernel, JITFunction)
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        """For each specialization: what Triton compiled, and the constants that follow the arguments."""

    def launch(self, blocks: int, *args: Any) -> None:
        """As `launch`."""
        if self.is_interpreted:
            self.kernel[(blocks,)](*args, **self.constants)
            return
        specialization = _specialize(args)
        device = specialization[0]
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(blocks, *args)
            return
        found = self.compiled.get(specialization)
        if found is None:
            self._compile_and_launch(blocks, args, specialization)
        elif _has_launch_hooks():
            found[0][(blocks, 1, 1)](*args, *found[1])
        else:
            _run(found[0], blocks, device, *args, *found[1])

    def _compile_and_launch(self, blocks: int, args: tuple[Any, ...], specialization: tuple[Any, ...]) -> None:
        for arg in args:
            if hasattr(arg, "block_shape"):
                arg.__post_init__()  # Triton's checks of a TMA descriptor
        compiled = self.kernel[(blocks,)](*args, **self.constants)
        if compiled is not None:
            trailing = tuple(self.constants[name] for name in self.kernel.arg_names[len(args) :])
            self.compiled[specialization] = compiled, trailing


_variants: dict[tuple[Any, ...], Variant] = {}


def launch(kernel: Any, blocks: int, *args: Any, **constants: Any) -> None:
    """`kernel[(blocks,)](*args, **constants)`, on the device of the first tensor.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`, defined once for the process.
        blocks: thread blocks, at least 1.
        args: its parameters that are no constants, in order: tensors, TMA descriptors, `int`s or None.
        constants: its constants and compilation options, by name.
    """
    key = (id(kernel), *constants, *constants.values())
    variant = _variants.get(key)
    if variant is None:
        variant = _variants[key] = Variant(kernel, **constants)
    variant.launch(blocks, *args)


def _has_launch_hooks() -> bool:
    """Whether someone, such as a profiler, is to be told of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, or one, or None


def _run(compiled: Any, blocks: int, device: int, *args: Any) -> None:
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


def tile_of(num_columns: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of so many elements, a power of two, as wide as `num_columns` fill it."""
    columns = min(power_of_2_from(num_columns), elements)
    return elements // columns, columns


def _specialize(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The device of the first tensor (-1 is the CPU), and whatever of `args` Triton's compiler may depend on."""
    device = None
    found: list[Any] = [-1]
    for arg in args:
        kind = type(arg)
        if kind is int:
            found.append(16 if arg & 15 == 0 else arg == 1)
            if arg >> 31:  # it does not fit into 31 bits: negative, or of 64 bits
                found.append(_width(arg))
        elif arg is None:
            found.append(None)
        else:
            tensor = arg
            if kind is not Tensor and not isinstance(arg, Tensor):
                tensor = arg.base  # of a TMA descriptor
                found.append(tuple(arg.block_shape))
            found.append(tensor.dtype)
            found.append(tensor.data_ptr() & 15 == 0)
            if device is None:
                device = found[0] = tensor.get_device()
    return tuple(found)


def _width(number: int) -> int:
    return 32 if -0x80000000 <= number < 0x80000000 else 64
