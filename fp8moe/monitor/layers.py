"""Which modules of a model are experts that fp8moe may compute."""

import re
import sys

from torch import nn

from fp8moe.integrations.handwritten import expert_parameters
from fp8moe.modules import SwiGLUExperts

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def experts_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """By name in the model, without what wraps it: the modules in whose forward a layer's experts compute.

    Mostly that is the module that has the weights: `SwiGLUExperts`, experts of transformers, of torchtitan, converted
    ones, or any other with two parameters `(E, ., .)` or more. torchtitan's module of a router's tokens computes in
    their place where several ranks share them.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SwiGLUExperts) or _is_dispatched(module) or expert_parameters(module):
            found.setdefault(_plain(name) or type(module).__name__, []).append(module)
        elif _sends_to_ranks(module):
            found.setdefault(_plain(f"{name}.inner_experts"), []).append(module)
    return found


def _is_dispatched(module: nn.Module) -> bool:
    """Whether transformers does: their parameters may be computed by a parametrization."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_concatenated")


def _sends_to_ranks(module: nn.Module) -> bool:
    titan = sys.modules.get("fp8moe.integrations.torchtitan")
    return titan is not None and isinstance(module, titan.FP8RoutedExperts)


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name).lstrip(".").removeprefix("module.")
