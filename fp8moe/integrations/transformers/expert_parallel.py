"""How tokens reach the experts of other ranks, as an `EPImplementation` of transformers: by `ep_moe_forward`.

transformers shards experts over the ranks of its mesh "ep" (`Shard(0)`), lets FSDP shard and divide the rest, and calls
this in the place of the forward of an experts module, while the parameters of the module are those of this rank.
"""

from functools import partial
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fp8moe.distributed import ep_moe_forward
from fp8moe.integrations.transformers.upstream import (
    ALL_EXPERTS_FUNCTIONS,
    AutoEP,
    EPImplementation,
    EPImplementationInterface,
)

Implementation: TypeAlias = Any
"""What `register` puts into `ALL_EXPERTS_FUNCTIONS`."""


class FP8MoeEP(EPImplementation):
    """Of one experts module. `name` is that of the registered implementation that computes; its options may change."""

    def __init__(self, name: str, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.name, self.experts = name, experts
        self.otherwise = AutoEP(experts, ep_mesh, tp_mesh)
        experts._fp8moe_ep = self

    @property
    def implementation(self) -> Implementation:
        """With the options of now."""
        return ALL_EXPERTS_FUNCTIONS[self.name]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(T, H)`, and `(T, k)` twice, with ids of all experts, to `(T, H)`. Ranks of `tp_mesh` have the same."""
        routed = hidden_states, top_k_index, top_k_weights
        return self.implementation.compute(self.experts, routed, self._layer, self.otherwise)

    def _layer(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, **options: Any
    ) -> Tensor:
        """In the place of `moe_forward`. Ranks that have the same tokens take a part of them each."""
        mine, mesh = [hidden, ids, weights], self.tp_mesh
        if mesh.size() > 1:
            parts = (DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in mine)
            mine = [part.redistribute(mesh, [Shard(0)]).to_local() for part in parts]
        out = ep_moe_forward(*mine, gate_up, down, self.ep_mesh, dispatch=self.implementation.dispatch, **options)
        if mesh.size() > 1:
            shape, strides = hidden.shape, (hidden.shape[1], 1)
            out = DTensor.from_local(out.contiguous(), mesh, [Shard(0)], shape=shape, stride=strides).full_tensor()
        return out


def register_ep(name: str) -> None:
    """Make `name` an `ep_implementation` of transformers."""
    EPImplementationInterface.register(name, partial(FP8MoeEP, name))


def is_taken(name: str) -> bool:
    """Whether transformers has an `ep_implementation` of its own with this name."""
    known = EPImplementationInterface().get(name)
    return known is not None and getattr(known, "func", None) is not FP8MoeEP
