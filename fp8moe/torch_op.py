"""Registration of the package's PyTorch operators (`torch.ops.fp8moe.*`)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("fp8moe", "DEF")

Op = TypeVar("Op", bound=Callable[..., Any])


def torch_op(
    fake: Callable[..., Any], mutates_args: Sequence[str] = (), *, of_integers: bool = False
) -> Callable[[Op], Op]:  # fmt: skip
    """Make the decorated function the PyTorch operator `fp8moe::<name>`.

    `torch.compile`, `FakeTensorMode` and dispatch modes see one opaque operator, so Triton launches need no tracing and
    compiled code computes the same bits as eager code. It has no gradient of its own: the autograd functions call it.
    Where nobody could see it, an eager call goes straight to the function: PyTorch's way there is as long as a launch.

    The operator is defined by hand rather than by `torch.library.custom_op`, whose aliasing checks cost host time on
    every call. So the function must mutate the arguments that it declares and no others, and return neither an argument
    nor a view of one. If it writes by other means than PyTorch's own operators, it must also raise the tensor's version
    (`torch.autograd.graph.increment_version`), because nothing else does.

    Args:
        fake: takes the same arguments, returns tensors of the right shapes, dtypes, devices and strides
            (`returns_nothing` for a function that only mutates).
        mutates_args: names of the arguments that are written to.
        of_integers: whether no argument can need a gradient: then the function may be called itself in any grad mode.
    """

    def register(function: Op) -> Op:
        name = function.__name__.removeprefix("_")
        _LIBRARY.define(
            name + torch.library.infer_schema(function, mutates_args=mutates_args), tags=(torch.Tag.pt2_compliant_tag,)
        )
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fp8moe::{name}", fake, lib=_LIBRARY)
        op: Op = getattr(torch.ops.fp8moe, name).default

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            first = args[0]
            observed = (torch.is_grad_enabled() and not of_integers) or is_observed(
                first if isinstance(first, Tensor) else first[0]
            )
            return (op if observed else function)(*args, **kwargs)

        return cast(Op, call)

    return register


def is_traced(*tensors: Tensor) -> bool:
    """Whether a trace, a dispatch mode or a subclass of tensors is to see the operators called on `tensors`."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:  # noqa: SIM110 (a generator would take as long again)
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return True
    return False


def is_observed(tensor: Tensor) -> bool:
    """Whether operators called on `tensor` are traced, or a profiler lists them."""
    return is_traced(tensor) or torch._C._autograd._profiler_enabled()


def returns_nothing(*args: object, **kwargs: object) -> None:
    """The `fake` of an operator that only mutates its arguments."""
