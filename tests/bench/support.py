"""Problems small enough for every test, and the means to measure it."""

from functools import partial

import torch

from fp8moe.bench.ceilings import Ceilings
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import Lab
from fp8moe.bench.problem import Problem
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Balance, Shape, layer_shape, product_shape
from fp8moe.bench.task import Task
from fp8moe.bench.timing import Budget, HostStopwatch
from fp8moe.bench.variants import Variant, fp8moe_variants
from fp8moe.gemm.explain import explain

CPU = torch.device("cpu")
SHAPE = product_shape(200, 256, 128, 3)
LAYER_SHAPE = layer_shape(256, 3, 256, 128, 5)
GPT_OSS_SHAPE = layer_shape(200, 2, 72, 40, 3, "gpt-oss, tiny")
BUDGET = Budget(1, repetitions=3, min_runs=1, max_runs=1)


def small_problem() -> Problem:
    """Of `SHAPE`; its groups have 121, 0 and 79 rows."""
    return PRODUCT.problem(SHAPE, Balance.RAGGED, CPU, 2)


def small_layer(shape: Shape = LAYER_SHAPE) -> Problem:
    """A layer's."""
    return LAYER.problem(shape, Balance.SKEWED, CPU, 0)


def small_lab() -> Lab:
    ceilings = Ceilings(copy_gb_s=1, bf16_tflop_s=0.001, fp8_tflop_s=0.002)
    return Lab(HostStopwatch(), HostStopwatch(), op_budget=BUDGET, kernel_budget=BUDGET, ceilings=ceilings)


def auto_variants(task: Task, shape: Shape) -> dict[str, Variant]:
    """Those of AUTO on a CPU, by their options."""
    found = fp8moe_variants(task.run(shape), task.options(shape), partial(explain, CPU))
    return {variant.name.removeprefix("fp8moe auto").strip(): variant for variant in found}
