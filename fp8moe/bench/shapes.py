"""What is measured: the shapes people train, and how a router spreads their rows over the experts."""

from dataclasses import dataclass
from enum import Enum

import torch

from fp8moe.operands import BLOCK

POPULARITY_SPREAD = 0.5
"""Standard deviation of the logarithm of an expert's popularity: two thirds get 0.6 to 1.65 times the typical share."""
IDLE_PROBABILITY = 1 / 16
"""How often an expert gets no row at all where the routing is ragged."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one grouped product, forward `(M, K) @ (E, K, N)`.

    Raises:
        ValueError: a size is not positive, or `n` or `k` is not a multiple of 128.
    """

    m: int
    """Rows, all groups together."""
    n: int
    """Output features."""
    k: int
    """Contracted features."""
    e: int
    """Experts (groups)."""
    name: str = ""
    """Where the shape comes from, if anyone knows it by a name."""

    def __post_init__(self) -> None:
        for size, value in (("M", self.m), ("N", self.n), ("K", self.k), ("E", self.e)):
            if value < 1:
                raise ValueError(f"{size} of shape {self} is {value}; it must be positive")
        for size, value in (("N", self.n), ("K", self.k)):
            if value % BLOCK:
                raise ValueError(f"{size} of shape {self} is {value}; it must be a multiple of {BLOCK}")

    def __str__(self) -> str:
        return f"{self.m},{self.n},{self.k},{self.e}"

    @property
    def title(self) -> str:
        """The sizes, after the name if there is one."""
        return f"{self.name} ({self})" if self.name else f"({self})"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read `M,N,K,E`; a shape of the tables below comes with its name.

        Raises:
            ValueError: `text` is not four fitting integers.
        """
        try:
            m, n, k, e = (int(size) for size in text.split(","))
        except ValueError as error:
            raise ValueError(
                f"shape is {text!r}; it must be four integers M,N,K,E, such as 32768,4096,7168,8"
            ) from error
        shape = cls(m, n, k, e)
        return next((known for known in CUDA_SHAPES + CPU_SHAPES if str(known) == str(shape)), shape)


CUDA_SHAPES = (
    Shape(32768, 4096, 7168, 8, "DeepSeek-V3 gate-up"),
    Shape(32768, 7168, 2048, 8, "DeepSeek-V3 down"),
    Shape(32768, 2048, 7168, 8, "torchao's benchmark"),
    Shape(65536, 1536, 2048, 16, "Qwen3-30B-A3B gate-up"),
    Shape(65536, 2048, 768, 16, "Qwen3-30B-A3B down"),
    Shape(16384, 28672, 4096, 8, "Mixtral-8x7B gate-up"),
    Shape(32768, 2048, 2048, 64, "fine-grained"),
)
CPU_SHAPES = (Shape(512, 256, 256, 4, "tiny"), Shape(1024, 128, 384, 8, "tiny fine-grained"))


class Routing(Enum):
    """How the rows are spread over the experts."""

    EVEN = "even"
    """The same multiple of 128 rows for each: what no router gives, and what padding-free kernels like best."""
    SKEWED = "skewed"
    """By popularity, in multiples of 128 rows."""
    RAGGED = "ragged"
    """By popularity, row by row as a router does it: any size, and now and then none."""


def group_sizes(shape: Shape, routing: Routing, seed: int) -> list[int]:
    """Rows of each expert, `E` integers that sum to `M`; a function of the arguments alone.

    Raises:
        ValueError: `M` cannot be split that way.
    """
    if routing is Routing.EVEN:
        if shape.m % (BLOCK * shape.e):
            raise ValueError(
                f"M of shape {shape} is {shape.m}; the routing {routing.value} needs a multiple of 128 E = "
                f"{BLOCK * shape.e}: choose such an M, or another routing"
            )
        return [shape.m // shape.e] * shape.e
    unit = BLOCK if routing is Routing.SKEWED else 1
    if shape.m % unit:
        raise ValueError(
            f"M of shape {shape} is {shape.m}; the routing {routing.value} needs a multiple of {unit}: "
            "choose such an M, or the routing ragged"
        )
    generator = torch.Generator().manual_seed(seed)
    popularity = (POPULARITY_SPREAD * torch.randn(shape.e, generator=generator)).exp()
    if routing is Routing.RAGGED:
        idle = torch.rand(shape.e, generator=generator) < IDLE_PROBABILITY
        idle[popularity.argmax()] = False  # somebody has to work
        popularity[idle] = 0.0
    chosen = torch.multinomial(popularity, shape.m // unit, replacement=True, generator=generator)
    sizes: list[int] = (torch.bincount(chosen, minlength=shape.e) * unit).tolist()
    return sizes
