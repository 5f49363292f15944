"""Experts on several ranks in a model that `DistributedDataParallel` wraps: it must leave them alone.

DDP makes parameters and buffers the same on all ranks, and averages their gradients. Each rank has experts of its own.
"""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp8moe.distributed.modules import ExpertParallelExperts


def exclude_from_ddp(model: nn.Module) -> list[str]:
    """Let DistributedDataParallel leave the experts of each `ExpertParallelExperts` to their ranks.

        exclude_from_ddp(model)
        ddp = DistributedDataParallel(model)

    Call it on the module that DDP will wrap, before that. DDP then neither copies nor reduces what these experts have.
    Their gradients, which are sums over the tokens of all ranks of their group, are divided by the number of these
    ranks, as DDP divides all others; a `main_grad` is not. Where other ranks have the same experts again, give
    `ExpertParallelExperts` a DDP of its own over those first; see docs/distributed.md.

    Returns:
        the names of what DDP ignores now: parameters and buffers.

    Raises:
        ValueError: `model` has no `ExpertParallelExperts`, is wrapped already, or its experts are on the meta device.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model is wrapped in DistributedDataParallel already: call exclude_from_ddp before that")
    ignored = dict.fromkeys(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    experts = {name: module for name, module in model.named_modules() if isinstance(module, ExpertParallelExperts)}
    if not experts:
        raise ValueError(f"model is a {type(model).__name__} without ExpertParallelExperts: DDP can wrap it as it is")
    parameters = [
        (name, parameter, module.exchange.num_ranks)
        for prefix, module in experts.items()
        for name, parameter in module.named_parameters(prefix)
    ]
    on_meta = [name for name, parameter, _ in parameters if parameter.is_meta]
    if on_meta:  # whatever takes their place would have no hook
        raise ValueError(f"{on_meta[0]} is on the meta device: call exclude_from_ddp after model.to_empty")
    divided: set[Tensor] = {parameter for name, parameter, _ in parameters if name in ignored}
    for name, parameter, num_ranks in parameters:
        if parameter.requires_grad and parameter not in divided:
            parameter.register_hook(_Divide(num_ranks))
        divided.add(parameter)
        ignored[name] = None
    for prefix, module in experts.items():
        ignored |= dict.fromkeys(name for name, _ in module.named_buffers(prefix))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(ignored))
    return list(ignored)


class _Divide:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient / self.number
