"""How many ranks and nodes a token visits, and the bytes that it takes there: arithmetic, by uniform routing.

`P` ranks in nodes of `G`, `E` experts of all ranks, the same number on each; a token chooses `k` different ones.
"""

from dataclasses import dataclass
from math import comb

from fp8moe.bench.shapes import Shape
from fp8moe.distributed import Dispatch
from fp8moe.quantize.messages import MessageLayout

BF16_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the experts of a layer.

    Raises:
        ValueError: they do not fill nodes, or the experts do not divide among them.
    """

    count: int
    per_node: int
    num_experts: int
    node_limit: int | None = None
    """How many nodes at most the experts of a token lie on: they are drawn first, then its experts among theirs."""

    def __post_init__(self) -> None:
        if self.count % self.per_node and self.per_node % self.count:
            raise ValueError(f"count is {self.count}; it must be a multiple of per_node, {self.per_node}, or divide it")
        if self.num_experts % self.count:
            raise ValueError(f"num_experts is {self.num_experts}; it must be a multiple of count, {self.count}")
        if self.node_limit is not None and self.node_limit < 1:
            raise ValueError(f"node_limit is {self.node_limit}; it must be at least 1")

    @property
    def num_nodes(self) -> int:
        """Of those that have any of the ranks."""
        return max(self.count // self.per_node, 1)

    @property
    def nodes_in_reach(self) -> int:
        """Of one token."""
        return min(self.num_nodes, self.node_limit or self.num_nodes)

    def visited(self, k: int) -> float:
        """To how many ranks a token goes, its own included."""
        return self._places(self.count // self.num_nodes * self.nodes_in_reach, k)

    def visited_nodes(self, k: int) -> float:
        """To how many nodes."""
        return self._places(self.nodes_in_reach, k)

    def visited_near(self, k: int) -> float:
        """To how many other ranks of its own node: by symmetry each rank is visited as often."""
        return self.visited(k) * (min(self.per_node, self.count) - 1) / self.count

    def visited_far(self, k: int) -> float:
        """To how many ranks of other nodes."""
        return self.visited(k) * (self.count - min(self.per_node, self.count)) / self.count

    def _places(self, places: int, k: int) -> float:
        in_reach = self.num_experts // self.num_nodes * self.nodes_in_reach
        return expected_distinct(places, in_reach, k)


def expected_distinct(places: int, num_experts: int, k: int) -> float:
    """How many of `places`, which have the same number of experts each, `k` different experts lie on, on average.

    Raises:
        ValueError: there are fewer experts than a token chooses.
    """
    if k > num_experts:
        raise ValueError(f"k is {k}; it must be at most the number of experts in reach, {num_experts}")
    return places * (1 - comb(num_experts - num_experts // places, k) / comb(num_experts, k))


def exchanges(shape: Shape, dispatch: Dispatch | None) -> list[int]:
    """The exchanges of forward and backward, as the bytes that each takes along for each token and rank, or, in the
    plain layer, for each choice: tokens there and sums back, gradients there and back, and with these or after them
    those of the router's weights. None is the plain layer, which has none to send."""
    k, h = shape["k"], shape["H"]
    in_bf16 = BF16_BYTES * h
    if dispatch is None:
        return [in_bf16] * 4
    in_fp8 = dispatch is Dispatch.FP8
    tokens, gradients = (MessageLayout(h, each, in_fp8).num_bytes for each in (k, 0))
    back = [in_bf16, FP32_BYTES * k]
    if in_fp8:  # in one message
        back = [MessageLayout(h, k, in_fp8=False).num_bytes]
    return [tokens, in_bf16, gradients, *back]
