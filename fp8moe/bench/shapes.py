"""The sizes of what is measured, and how a router spreads rows over the experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fp8moe.operands import BLOCK

FEATURES, FEATURE_UNIT = frozenset("NKHI"), 8
"""Letters of sizes that must be such multiples: what PyTorch's `grouped_mm` takes, with rows of whole 16 bytes."""
POPULARITY_SPREAD = 0.5
"""Standard deviation of the logarithm of an expert's popularity: two thirds get 0.6 to 1.65 times the typical share."""
FEW_EXPERTS = 16
"""Of as many experts one is chosen where the balance is few."""
IDLE_PROBABILITY = 1 / 16
"""How often an expert gets no row at all where the balance is ragged."""


@dataclass(frozen=True)
class Shape:
    """Sizes known by letters: `MNKE` of a product, `TkHIE` of a layer.

    Raises:
        ValueError: a size is not positive, a number of features no multiple of 8, or `k` more than `E`.
    """

    letters: str
    sizes: tuple[int, ...]
    name: str = ""
    """Where the shape comes from, if anyone knows it by a name."""

    def __post_init__(self) -> None:
        for letter, size in zip(self.letters, self.sizes, strict=True):
            if size < 1:
                raise ValueError(f"{letter} of shape {self} is {size}; it must be positive")
            if letter in FEATURES and size % FEATURE_UNIT:
                raise ValueError(
                    f"{letter} of shape {self} is {size}; it must be a multiple of {FEATURE_UNIT}: "
                    "PyTorch's grouped_mm takes no other"
                )
        if "k" in self.letters and self["k"] > self["E"]:
            raise ValueError(
                f"k of shape {self} is {self['k']}; it must be at most E, {self['E']}: a token's experts all differ"
            )

    def __getitem__(self, letter: str) -> int:
        return self.sizes[self.letters.index(letter)]

    def __str__(self) -> str:
        return ",".join(map(str, self.sizes))

    @property
    def title(self) -> str:
        """The sizes, after the name if there is one."""
        return f"{self.name} ({self})" if self.name else f"({self})"


def product_shape(m: int, n: int, k: int, e: int, name: str = "") -> Shape:
    """Of `(M, K) @ (E, K, N)`: rows of all groups together, output features, contracted features, experts."""
    return Shape("MNKE", (m, n, k, e), name)


def layer_shape(t: int, k: int, h: int, i: int, e: int, name: str = "") -> Shape:
    """Of `(T, H)` to `(T, H)`: tokens, experts that each chooses, features, features of an activation, experts."""
    return Shape("TkHIE", (t, k, h, i, e), name)


def parse_shape(text: str, known: Sequence[Shape], make: Callable[..., Shape]) -> Shape:
    """Read the sizes of a shape that `make` makes, such as `M,N,K,E`; one that is `known` comes with its name.

    Raises:
        ValueError: `text` is not as many fitting integers.
    """
    letters, example = known[0].letters, known[0]
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != len(letters):
        raise ValueError(f"shape is {text!r}; it must be integers {','.join(letters)}, such as {example}")
    found = make(*sizes)
    return next((named for named in known if named.sizes == found.sizes), found)


def with_name(part: str, shapes: Sequence[Shape]) -> list[Shape]:
    """Those of `shapes` whose names contain `part`, in upper or lower case.

    Raises:
        ValueError: there are none.
    """
    found = [shape for shape in shapes if part.lower() in shape.name.lower()]
    if not found:
        names = ", ".join(repr(shape.name) for shape in shapes)
        raise ValueError(f"--only {part!r} is in no name of a default shape; they are {names}")
    return found


class Balance(Enum):
    """How a router spreads the rows over the experts."""

    EVEN = "even"
    """As many rows for each: what no router gives, and, in multiples of 128, what padding-free kernels like best."""
    SKEWED = "skewed"
    """By popularity, log-normal: of a product in multiples of 128 rows."""
    RAGGED = "ragged"
    """By popularity, row by row: any size, and now and then none."""
    UNIFORM = "uniform"
    """Each token chooses every expert with the same probability."""
    FEW = "few"
    """Each token chooses among the first sixteenth of the experts, or the first `k`: on several ranks those of the
    first rank, or of the first few. Others get nothing."""


def draw_group_sizes(shape: Shape, balance: Balance, seed: int) -> list[int]:
    """Rows of each expert of a product, `E` integers that sum to `M`: a function of the arguments alone."""
    m, num_experts = shape["M"], shape["E"]
    if balance is Balance.EVEN:
        return [m // num_experts + (expert < m % num_experts) for expert in range(num_experts)]
    unit = BLOCK if balance is Balance.SKEWED else 1
    generator = torch.Generator().manual_seed(seed)
    popularity = _draw_popularity(num_experts, generator)
    if balance is Balance.RAGGED:
        idle = torch.rand(num_experts, generator=generator) < IDLE_PROBABILITY
        idle[popularity.argmax()] = False  # somebody has to work
        popularity[idle] = 0.0
    chosen = torch.multinomial(popularity, -(-m // unit), replacement=True, generator=generator)
    sizes = torch.bincount(chosen, minlength=num_experts) * unit
    sizes[sizes.argmax()] -= -m % unit  # where M is no multiple
    return [int(size) for size in sizes]


def draw_topk(shape: Shape, balance: Balance, seed: int) -> tuple[Tensor, Tensor]:
    """What a layer's router says of random tokens: a function of the arguments alone.

    Returns:
        topk_ids: int64 `(T, k)`, on the CPU: the experts with the highest scores, all different.
        topk_weights: fp32 `(T, k)`: random as well, and 1 for each token in all.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape["T"], shape["E"], generator=generator)
    if balance is Balance.SKEWED:
        # Then an expert is the first choice as often as it is popular, and of the rest, the second, and so on.
        scores = scores ** (1 / _draw_popularity(shape["E"], generator))
    if balance is Balance.FEW:
        scores[:, max(shape["E"] // FEW_EXPERTS, shape["k"]) :] = -1
    weights = torch.randn(shape["T"], shape["k"], generator=generator).softmax(1)
    return scores.topk(shape["k"]).indices, weights


def _draw_popularity(num_experts: int, generator: torch.Generator) -> Tensor:
    """How often each expert is chosen, against the others: `(E,)`."""
    return (POPULARITY_SPREAD * torch.randn(num_experts, generator=generator)).exp()
