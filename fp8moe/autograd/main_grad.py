"""Gradients that go to a weight's `main_grad`: when a backward is to add one, and who must not use them."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fp8moe.quantize.gathered import GatheredWeight


def with_main_grad(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """The same weight, with a node of autograd's before it that `is_wanted` can ask about: PyTorch has no answer for
    leaves. Compiled code computes all gradients at once, so it needs none."""
    if main_grad is None or not weight.is_leaf or torch.compiler.is_compiling():
        return weight
    return torch.ops.aten.alias.default(weight)


def is_wanted(ctx: Any, number: int) -> bool:
    """Within `Function.backward`: whether this backward goes on to an input that is `with_main_grad`, the `number`-th
    of the inputs that are tensors.

    `torch.autograd.grad` with respect to other inputs, as in the first half of a zero-bubble pipeline's backward, does
    not: what it added to the `main_grad` would be added again by the second half.
    """
    if torch.compiler.is_compiling():
        return True
    node = ctx.next_functions[number][0]
    return node is None or torch._C._will_engine_execute_node(node)


def nothing_for(ctx: Any, number: int, main_grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Within `Function.backward`: the gradient to return for an input whose gradient went to its `main_grad`.

    None, so that `.grad` stays as it is. But `torch.autograd.grad` refuses to return nothing for a weight, and who asks
    by it (a zero-bubble pipeline) adds up what it returns: a sparse tensor without elements.
    """
    if torch.compiler.is_compiling() or not _is_returned(ctx.next_functions[number][0]):
        return None
    return torch.zeros(main_grad.shape, dtype=dtype, layout=torch.sparse_coo, device=main_grad.device)


def check_is_reduced_by_the_caller(name: str, weight: Tensor) -> None:
    """A `main_grad` of `weight` must not be expected to be reduced by DDP or FSDP, which reduce `.grad` alone.

    Raises:
        ValueError: the weight belongs to DDP, outside `no_sync`, or to FSDP.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    ddp = active_ddp()
    if ddp is not None and ddp.require_backward_grad_sync and (not _root(weight).is_leaf or is_of(ddp, weight)):
        raise ValueError(
            f"{name} is given within DistributedDataParallel, which reduces .grad alone: the ranks' sums would differ. "
            "Leave it out, or reduce it yourself: run forward and backward under no_sync(), or let DDP ignore the "
            "weight (DistributedDataParallel._set_params_and_buffers_to_ignore_for_model)"
        )
    if _belongs_to_fsdp(weight):
        raise ValueError(f"{name} is of a weight of FSDP, which reduces .grad alone: leave it out")


def active_ddp() -> DistributedDataParallel | None:
    """The DDP whose forward runs. `torch.distributed._composable.replicate` has one too."""
    return DistributedDataParallel._active_ddp_module  # by its attribute, so that a trace guards on it


def is_of(ddp: DistributedDataParallel, weight: Tensor) -> bool:
    """Whether the weight, or what it is a view of, is a parameter that `ddp` keeps the same on all ranks."""
    root = _root(weight)
    return any(root is parameter for parameter in ddp._module_parameters)


def _root(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base


def _is_returned(node: Any) -> bool:
    """Whether the running backward returns the gradient of the leaf behind `node` instead of accumulating it."""
    while node is not None and not hasattr(node, "variable"):  # the weight may be a view or a copy of the leaf
        following = [function for function, _ in node.next_functions if function is not None]
        node = following[0] if len(following) == 1 else None
    if node is None:
        return False
    try:
        torch._C._will_engine_execute_node(node)
    except RuntimeError:  # PyTorch's answer for leaves under torch.autograd.grad
        return True
    return False


def _belongs_to_fsdp(weight: Tensor) -> bool:
    if isinstance(weight, GatheredWeight):
        return True
    if torch.compiler.is_compiling():
        return False
    if getattr(weight._base, "_is_flat_param", False):  # FSDP1
        return True
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    memory = weight.untyped_storage()._cdata
    for parameter, _ in parameters_of_fsdp():
        unsharded = getattr(parameter, "_unsharded_param", None)
        if unsharded is not None and unsharded.untyped_storage()._cdata == memory:
            return True
    return False


def parameters_of_fsdp() -> Iterator[tuple[Any, Any]]:
    """The `FSDPParam` of each parameter that FSDP2 shards in this process, and its `FSDPParamGroup`."""
    from torch.distributed._composable_state import _module_state_mapping

    for state in _module_state_mapping.values():
        groups = getattr(state(), "_fsdp_param_groups", None) or [getattr(state(), "_fsdp_param_group", None)]
        for group in groups:
            for parameter in () if group is None else group.fsdp_params:
                yield parameter, group
