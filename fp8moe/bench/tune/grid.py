"""The shapes that a cost model is fitted to: small and middle ones, around where FP8 begins to pay."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from fp8moe.bench.layer.shapes import LayerShape, TopkRouting
from fp8moe.bench.layer.task import LayerTask
from fp8moe.bench.op_task import OpTask
from fp8moe.bench.shapes import Routing, Shape
from fp8moe.bench.task import Task

ROWS = (1024, 2048, 4096, 8192, 16384, 32768)
FEATURES = ((768, 768), (1536, 2048), (2048, 768), (2048, 2048), (4096, 2048), (4096, 7168), (2048, 7168))
"""`N` and `K`."""
EXPERTS = (8, 32, 128)
MAX_WEIGHTS = 10**9
"""Elements. With its gradient and both FP8 copies a larger weight takes more than 6 GB, and its passes too long."""

LAYERS = (  # of the same weights from few rows to many
    LayerShape(1024, 2, 1024, 512, 8),
    LayerShape(4096, 2, 1024, 512, 8),
    LayerShape(2048, 4, 1024, 512, 32),
    LayerShape(8192, 4, 1024, 512, 32),
    LayerShape(1024, 8, 2048, 768, 16),
    LayerShape(8192, 8, 2048, 768, 16),
    LayerShape(512, 8, 2048, 768, 128),
    LayerShape(2048, 8, 2048, 768, 128),
    LayerShape(8192, 8, 2048, 768, 128),
    LayerShape(1024, 4, 7168, 2048, 8),
    LayerShape(2048, 4, 7168, 2048, 8),
    LayerShape(8192, 4, 7168, 2048, 8),
)
SEED = 0


def tasks(quick: bool) -> list[Task[Any]]:
    """All that is measured; with `quick` every second number of rows and every second layer."""
    step = 2 if quick else 1
    shapes = [
        Shape(m, n, k, e) for m, (n, k), e in product(ROWS[::step], FEATURES, EXPERTS) if e * n * k <= MAX_WEIGHTS
    ]
    return [
        *OpTask.each(shapes, [Routing.RAGGED], SEED),
        *LayerTask.each(LAYERS[::step], [TopkRouting.UNIFORM]),
    ]


def with_host(tasks: Sequence[Task[Any]]) -> list[bool]:
    """Of each, whether the host's time is measured as well: where it is the first, and smallest, of as many weights.

    The host needs the same time for any number of rows.
    """
    kinds = [(task.WHAT, task.shape.work.weights) for task in tasks]
    return [kind not in kinds[:number] for number, kind in enumerate(kinds)]
