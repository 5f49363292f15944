"""FSDP2 on a GPU, with NCCL and one rank: streams, and the kernels on what is gathered in FP8."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from fp8moe import FP8Config, SwiGLUExperts
from fp8moe.distributed import gather_in_fp8
from tests.gpu.test_distributed import nccl
from tests.measures import assert_same_bits

__all__ = ["nccl"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("nccl"),
    pytest.mark.filterwarnings("ignore"),  # of PyTorch, about one rank
]


def train(config: FP8Config, shard: bool, in_fp8: bool, checkpointed: bool, dim: int, reshard: bool) -> list[Tensor]:
    """Two steps of two microbatches; all that came of it."""
    torch.manual_seed(0)
    layers: list[Any] = [SwiGLUExperts(4, 512, 384, config, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    layers = [checkpoint_wrapper(layer) for layer in layers] if checkpointed else layers
    mesh = init_device_mesh("cuda", (1,))
    for layer in layers if shard else ():
        fully_shard(layer, mesh=mesh, shard_placement_fn=lambda _: Shard(dim), reshard_after_forward=reshard)
        if in_fp8:
            assert gather_in_fp8(layer) == 2
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-2, fused=True), []
    for _ in range(2):
        for _ in range(2):
            x = torch.randn(700, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            ids, weights = torch.randint(4, (700, 2), device="cuda"), torch.rand(700, 2, device="cuda")
            out = x
            for layer in layers:
                out = layer(out, ids, weights)
            out.square().sum().backward()
            assert x.grad is not None
            found += [out.detach(), x.grad]
        optimizer.step()
        optimizer.zero_grad()
    found += [getattr(parameter, "_local_tensor", parameter).detach().clone() for parameter in parameters]
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("reshard", [True, False])
def test_the_bits_are_those_of_the_layer_alone(config: FP8Config, checkpointed: bool, dim: int, reshard: bool) -> None:
    expected = train(config, False, False, checkpointed, dim, reshard)
    for in_fp8 in (False, True):
        actual = train(config, True, in_fp8, checkpointed, dim, reshard)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_same_bits(mine, theirs)
    assert all(x.any() for x in expected)
