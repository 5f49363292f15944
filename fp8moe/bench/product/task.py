"""One grouped product, `fp8moe.grouped_mm`."""

from collections.abc import Sequence

import torch
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, WeightCache
from fp8moe.bench.floor import product_step
from fp8moe.bench.peers import TORCHAO, torchao_variant
from fp8moe.bench.problem import Problem, random_normal
from fp8moe.bench.product.kernels import kernels
from fp8moe.bench.shapes import Balance, Shape, draw_group_sizes, product_shape
from fp8moe.bench.task import Task
from fp8moe.bench.variants import Option, bf16_op, bf16_variants
from fp8moe.gemm.cost import OpSize


def draw(shape: Shape, balance: Balance, device: torch.device, seed: int) -> Problem:
    """Of `a` `(M, K)`, `w` `(E, N, K)` and `offs` `(E,)` to `(M, N)`: standard normal activations and gradients,
    weights that keep the outputs of that size."""
    group_sizes = draw_group_sizes(shape, balance, seed)
    normal = random_normal(device, seed)
    m, n, k, e = shape.sizes
    arguments = {
        "a": normal(m, k).requires_grad_(),
        "w": normal(e, n, k).mul_(k**-0.5).requires_grad_(),
        "offs": torch.tensor(group_sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
    }
    return Problem(arguments, normal(m, n), group_sizes)


def _run(
    a: Tensor,
    w: Tensor,
    offs: Tensor,
    config: FP8Config,
    weight_caches: Sequence[WeightCache] = (),
    main_grads: Sequence[Tensor] = (),
) -> Tensor:
    return fp8moe.grouped_mm(
        a,
        w.transpose(-2, -1),
        offs,
        config=config,
        weight_cache=weight_caches[0] if weight_caches else None,
        main_grad=main_grads[0].transpose(-2, -1) if main_grads else None,
    )


OPTIONS = (
    Option(""),
    Option("weights kept", kept=True),
    Option("main_grad", main_grad=True),
    Option("cached", cached=True),
)

PRODUCT = Task(
    name="op",
    title="Grouped matrix product",
    explained_as="shape",
    shape=product_shape,
    shapes_on_cuda=(
        product_shape(32768, 4096, 7168, 8, "DeepSeek-V3 gate-up"),
        product_shape(32768, 7168, 2048, 8, "DeepSeek-V3 down"),
        product_shape(32768, 2048, 7168, 8, "torchao's benchmark"),
        product_shape(65536, 1536, 2048, 16, "Qwen3-30B-A3B gate-up"),
        product_shape(65536, 2048, 768, 16, "Qwen3-30B-A3B down"),
        product_shape(16384, 28672, 4096, 8, "Mixtral-8x7B gate-up"),
        product_shape(32768, 2048, 2048, 64, "fine-grained"),
    ),
    shapes_on_cpu=(product_shape(512, 256, 256, 4, "tiny"), product_shape(1024, 128, 384, 8, "tiny fine-grained")),
    balances=(Balance.RAGGED, Balance.EVEN, Balance.SKEWED),
    problem=draw,
    reference=lambda shape: bf16_op,
    eager=lambda shape: bf16_op,
    # Compiled it is no other: PyTorch's compiler takes the same kernel, unless it is told to tune.
    baselines=lambda shape, device: list(bf16_variants("BF16", bf16_op, "torch grouped_mm")),
    peer_package=TORCHAO,
    peer=lambda shape, group_sizes: torchao_variant(group_sizes),
    run=lambda shape: _run,
    options=lambda shape: OPTIONS,
    kernels=kernels,
    step=product_step,
    op_size=lambda shape: OpSize.of_product(*shape.sizes),
)
