"""How rows get from rank to rank. All that expert parallelism asks of a transport is one all-to-all of rows, during
which the device can compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Arrival(Protocol):
    """Rows on their way to this rank."""

    def wait(self) -> Tensor:
        """Let the current stream wait until they are there.

        Returns:
            `(sum(received), N)`, contiguous.
        """
        ...


@runtime_checkable
class Exchange(Protocol):
    """A transport between the ranks that share the experts. Implement it to use another than `torch.distributed`'s.

    Every rank calls it in the same order, in forward and in backward, on the thread of autograd. A deep copy of a
    module copies it: have `__deepcopy__` return the same one if it cannot be copied.
    """

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        ...

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        """Begin to send the rows of `x` to the ranks, as soon as the current stream has come here, and to receive what
        they send.

        Args:
            x: of any dtype `(sum(sent), N)`, contiguous. Nobody changes it, but its last reference may go.
            sent: how many rows go to each rank, one after the other in `x`.
            received: how many come from each.

        Returns:
            What they send, in the order of the ranks. It is waited for once, on the stream that sent.
        """
        ...


class TorchExchange:
    """`torch.distributed.all_to_all_single`, in a process group: NCCL on GPUs, gloo on CPUs.

    Args:
        group: a process group, or a mesh of one dimension; None is all ranks.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh has more than one dimension, this process is not in the group, or there are no groups.
    """

    def __init__(self, group: object) -> None:
        if group is None:
            if not dist.is_initialized():
                raise ValueError(
                    "group is None, which is all ranks, and there are none yet: call "
                    "torch.distributed.init_process_group first"
                )
            group = dist.group.WORLD
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group is a mesh of {group.ndim} dimensions; it must have one: pass the dimension of the experts, "
                    'such as mesh["ep"]'
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("group does not have this process: call it on the ranks of the group alone")
            raise TypeError(
                f"group is a {type(group).__name__}; it must be a torch.distributed.ProcessGroup, a DeviceMesh "
                "of one dimension, an fp8moe.distributed.Exchange, or None for all ranks"
            )
        self.group = group

    def __deepcopy__(self, memo: object) -> "TorchExchange":
        """A copy of a module communicates with the same ranks."""
        return self

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self.group.size()

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arrival:
        """As in `Exchange`."""
        out = x.new_empty((sum(received), x.shape[1]))
        # As bytes, which every backend carries.
        work = dist.all_to_all_single(
            out.view(torch.uint8), x.view(torch.uint8), list(received), list(sent), group=self.group, async_op=True
        )
        return _TorchArrival(work, x, out)


@dataclass
class _TorchArrival:
    work: dist.Work
    sent: Tensor | None
    """Held until it has been sent."""
    received: Tensor

    def wait(self) -> Tensor:
        """As in `Arrival`."""
        self.work.wait()
        self.sent = None
        return self.received


def exchange_of(group: object) -> Exchange:
    """The transport that the user's `group` stands for.

    Raises:
        TypeError, ValueError: as `TorchExchange`.
    """
    # Asking for a protocol looks at each of its members: not for what a module passes in every forward.
    return group if isinstance(group, TorchExchange | Exchange) else TorchExchange(group)
