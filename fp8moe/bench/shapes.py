"""What is measured: the shapes people train, and how a router spreads their rows over the experts."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fp8moe.gemm.cost import OpSize
from fp8moe.operands import BLOCK

POPULARITY_SPREAD = 0.5
"""Standard deviation of the logarithm of an expert's popularity: two thirds get 0.6 to 1.65 times the typical share."""
IDLE_PROBABILITY = 1 / 16
"""How often an expert gets no row at all where the routing is ragged."""


class AnyShape:
    """What a shape is: sizes known by letters, the number of experts last, and perhaps a name.

    A subclass is a frozen dataclass of as many integers and `name`.
    """

    LETTERS: ClassVar[tuple[str, ...]]
    FEATURES: ClassVar[tuple[str, ...]]
    """Those that must be multiples of 128."""
    EXAMPLE: ClassVar[str]
    e: int
    name: str

    def __post_init__(self) -> None:
        for letter, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{letter} of shape {self} is {size}; it must be positive")
        for letter in self.FEATURES:
            if self.sizes[letter] % BLOCK:
                raise ValueError(f"{letter} of shape {self} is {self.sizes[letter]}; it must be a multiple of {BLOCK}")

    def __str__(self) -> str:
        return ",".join(map(str, self.sizes.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """By their letters."""
        return {letter: getattr(self, letter.lower()) for letter in self.LETTERS}

    @property
    def title(self) -> str:
        """The sizes, after the name if there is one."""
        return f"{self.name} ({self})" if self.name else f"({self})"

    @property
    def explained(self) -> dict[str, Any]:
        """The sizes as an argument of `fp8moe.explain`, by its name."""
        raise NotImplementedError

    @property
    def work(self) -> OpSize:
        """By which AUTO decides between FP8 and BF16."""
        raise NotImplementedError

    @classmethod
    def known(cls) -> tuple[Self, ...]:
        """Those that have names."""
        raise NotImplementedError

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the sizes, such as `M,N,K,E`; a shape that is known comes with its name.

        Raises:
            ValueError: `text` is not as many fitting integers.
        """
        try:
            sizes = [int(size) for size in text.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != len(cls.LETTERS):
            raise ValueError(f"shape is {text!r}; it must be integers {','.join(cls.LETTERS)}, such as {cls.EXAMPLE}")
        shape = cls(*sizes)
        return next((known for known in cls.known() if str(known) == str(shape)), shape)


@dataclass(frozen=True)
class Shape(AnyShape):
    """Sizes of one grouped product, forward `(M, K) @ (E, K, N)`.

    Raises:
        ValueError: a size is not positive, or `n` or `k` is not a multiple of 128.
    """

    LETTERS = ("M", "N", "K", "E")
    FEATURES = ("N", "K")
    EXAMPLE = "32768,4096,7168,8"

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

    @property
    def explained(self) -> dict[str, Any]:
        return {"shape": tuple(self.sizes.values())}

    @property
    def work(self) -> OpSize:
        return OpSize.of_product(self.m, self.n, self.k, self.e)

    @classmethod
    def known(cls) -> tuple["Shape", ...]:
        return CUDA_SHAPES + CPU_SHAPES


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
    popularity = draw_popularity(shape.e, generator)
    if routing is Routing.RAGGED:
        idle = torch.rand(shape.e, generator=generator) < IDLE_PROBABILITY
        idle[popularity.argmax()] = False  # somebody has to work
        popularity[idle] = 0.0
    chosen = torch.multinomial(popularity, shape.m // unit, replacement=True, generator=generator)
    sizes: list[int] = (torch.bincount(chosen, minlength=shape.e) * unit).tolist()
    return sizes


def draw_popularity(num_experts: int, generator: torch.Generator) -> Tensor:
    """How often each expert is chosen, against the others: `(E,)`, log-normal."""
    return (POPULARITY_SPREAD * torch.randn(num_experts, generator=generator)).exp()
