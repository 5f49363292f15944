"""The shapes that a cost model is fitted to: small and middle ones, around where FP8 begins to pay."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Shape, layer_shape, product_shape
from fp8moe.bench.task import Task
from fp8moe.gemm.cost import OpSize

ROWS = (1024, 2048, 4096, 8192, 16384, 32768)
FEATURES = ((768, 768), (1536, 2048), (2048, 768), (2048, 2048), (4096, 2048), (4096, 7168), (2048, 7168))
"""`N` and `K`."""
EXPERTS = (8, 32, 128)
MAX_WEIGHTS = 10**9
"""Elements. With its gradient and both FP8 copies a larger weight takes more than 6 GB, and its passes too long."""

LAYERS = (  # of the same weights from few rows to many
    layer_shape(1024, 2, 1024, 512, 8),
    layer_shape(4096, 2, 1024, 512, 8),
    layer_shape(2048, 4, 1024, 512, 32),
    layer_shape(8192, 4, 1024, 512, 32),
    layer_shape(1024, 8, 2048, 768, 16),
    layer_shape(8192, 8, 2048, 768, 16),
    layer_shape(512, 8, 2048, 768, 128),
    layer_shape(2048, 8, 2048, 768, 128),
    layer_shape(8192, 8, 2048, 768, 128),
    layer_shape(1024, 4, 7168, 2048, 8),
    layer_shape(2048, 4, 7168, 2048, 8),
    layer_shape(8192, 4, 7168, 2048, 8),
)


class Case(NamedTuple):
    """What is measured, as routers usually spread its rows."""

    task: Task
    shape: Shape

    @property
    def title(self) -> str:
        """For a reader."""
        return f"{self.task.title} {self.shape.title}"

    @property
    def work(self) -> OpSize:
        """By which AUTO decides."""
        return self.task.op_size(self.shape)


def cases(quick: bool) -> list[Case]:
    """All that is measured; with `quick` every second number of rows and every second layer."""
    step = 2 if quick else 1
    products = [
        product_shape(m, n, k, e)
        for m, (n, k), e in product(ROWS[::step], FEATURES, EXPERTS)
        if e * n * k <= MAX_WEIGHTS
    ]
    return [*(Case(PRODUCT, shape) for shape in products), *(Case(LAYER, shape) for shape in LAYERS[::step])]


def with_host(cases: Sequence[Case]) -> list[bool]:
    """Of each, whether the host's time is measured as well: where it is the first, and smallest, of as many weights.

    The host needs the same time for any number of rows.
    """
    kinds = [(case.task.name, case.work.weights) for case in cases]
    return [kind not in kinds[:number] for number, kind in enumerate(kinds)]
