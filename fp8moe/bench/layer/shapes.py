"""The layers that are measured, and how a router spreads their tokens over the experts."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fp8moe.bench.shapes import AnyShape, Shape, draw_popularity
from fp8moe.gemm.cost import OpSize


@dataclass(frozen=True)
class LayerShape(AnyShape):
    """Sizes of one layer: `(T, H)` to `(T, H)`, each token through `k` of `E` SwiGLU experts of `I` features.

    Raises:
        ValueError: a size is not positive, `h` or `i` is not a multiple of 128, or `k` is more than `e`.
    """

    LETTERS = ("T", "k", "H", "I", "E")
    FEATURES = ("H", "I")
    EXAMPLE = "8192,4,7168,2048,8"

    t: int
    """Tokens."""
    k: int
    """Experts that each token chooses, all different."""
    h: int
    """Features of a token."""
    i: int
    """Features of an expert's activation."""
    e: int
    """Experts."""
    name: str = ""
    """Where the shape comes from, if anyone knows it by a name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.e:
            raise ValueError(
                f"k of shape {self} is {self.k}; it must be at most E, {self.e}: a token's experts are all different"
            )

    @property
    def gate_up(self) -> Shape:
        """The first product: `T k` rows of `H` features to gate and up."""
        return Shape(self.t * self.k, 2 * self.i, self.h, self.e)

    @property
    def down(self) -> Shape:
        """The second: the activations back to `H` features."""
        return Shape(self.t * self.k, self.h, self.i, self.e)

    @property
    def explained(self) -> dict[str, Any]:
        return {"layer": tuple(self.sizes.values())}

    @property
    def work(self) -> OpSize:
        return OpSize.of_layer(self.t * self.k, self.h, self.i, self.e)

    @classmethod
    def known(cls) -> tuple["LayerShape", ...]:
        return CUDA_LAYERS + CPU_LAYERS


CUDA_LAYERS = (
    LayerShape(8192, 4, 7168, 2048, 8, "like DeepSeek-V3"),
    LayerShape(8192, 8, 2048, 768, 16, "Qwen3-30B-A3B, an expert-parallel share"),
    LayerShape(8192, 8, 2048, 768, 128, "Qwen3-30B-A3B, all experts"),
)
CPU_LAYERS = (LayerShape(512, 2, 256, 128, 4, "tiny"), LayerShape(512, 4, 128, 128, 8, "tiny fine-grained"))


class TopkRouting(Enum):
    """How a router spreads the tokens' choices over the experts."""

    UNIFORM = "uniform"
    """Every expert is as likely as every other."""
    SKEWED = "skewed"
    """By popularity, log-normal: some experts get several times as many tokens as others."""


def draw_topk(shape: LayerShape, routing: TopkRouting, seed: int) -> tuple[Tensor, Tensor]:
    """What a router says of random tokens: a function of the arguments alone.

    Returns:
        topk_ids: int64 `(T, k)`, on the CPU: the experts with the highest scores, all different.
        topk_weights: fp32 `(T, k)`: random as well, and 1 for each token in all.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape.t, shape.e, generator=generator)
    if routing is TopkRouting.SKEWED:
        # Then an expert is the first choice as often as it is popular, and of the rest, the second, and so on.
        scores = scores ** (1 / draw_popularity(shape.e, generator))
    weights = torch.randn(shape.t, shape.k, generator=generator).softmax(1)
    return scores.topk(shape.k).indices, weights
