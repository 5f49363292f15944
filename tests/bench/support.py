"""Problems small enough for every test, and the means to measure it."""

import torch

from fp8moe.bench.floor import Ceilings
from fp8moe.bench.layer.problem import LayerProblem
from fp8moe.bench.layer.shapes import LayerShape, TopkRouting
from fp8moe.bench.op_problem import OpProblem
from fp8moe.bench.ops import Lab
from fp8moe.bench.shapes import Routing, Shape
from fp8moe.bench.timing import Budget, HostStopwatch

CPU = torch.device("cpu")
SHAPE = Shape(200, 256, 128, 3)
GROUP_SIZES = [70, 0, 130]
LAYER = LayerShape(256, 3, 256, 128, 5)
BUDGET = Budget(1, min_repeats=2, max_repeats=2)


def small_problem() -> OpProblem:
    return OpProblem.random(SHAPE, Routing.RAGGED, GROUP_SIZES, torch.bfloat16, CPU, seed=0)


def small_layer(dtype: torch.dtype = torch.bfloat16) -> LayerProblem:
    return LayerProblem.random(LAYER, TopkRouting.SKEWED, dtype, CPU, seed=0)


def small_lab() -> Lab:
    ceilings = Ceilings(copy_gb_s=1, bf16_tflop_s=0.001, fp8_tflop_s=0.002)
    return Lab(CPU, HostStopwatch(), HostStopwatch(), op_budget=BUDGET, kernel_budget=BUDGET, ceilings=ceilings)
