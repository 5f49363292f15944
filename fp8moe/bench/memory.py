"""What a differentiable op keeps for its backward, and the most it holds at once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fp8moe.bench.timing import Region


def saved_tensors(forward: Callable[[], object]) -> list[Tensor]:
    """The tensors that `forward` saves for backward, one for each storage: views share what they view.

    Its output is not to be differentiated: what is saved here is cut from the graph. A graph that saved its own tensors
    through a hook would never be freed, and could not be captured afterwards.
    """
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        saved.setdefault(tensor.untyped_storage().data_ptr(), detached)
        return detached

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return list(saved.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the whole storages: a saved slice keeps all of what it was cut from."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def grows_with_rows(tensor: Tensor, num_experts: int) -> bool:
    """Whether a tensor saved for backward grows with the rows.

    Neither a weight, or what is made of one, does (those alone have three dimensions), nor one number an expert.
    """
    return tensor.dim() != 3 and tensor.shape != (num_experts,)


def peak_bytes(region: Region, device: torch.device) -> int | None:
    """The most device memory that a run of `region` holds beyond what was held before; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    region()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
