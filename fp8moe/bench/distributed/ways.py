"""The ways to compute a layer whose experts are on several ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8moe.autograd.experts import swiglu_experts
from fp8moe.bench.distributed.plain import as_it_is, plain_experts, plain_layer
from fp8moe.bench.distributed.problem import RankProblem
from fp8moe.bench.layer.baseline import Function
from fp8moe.bench.problem import Op
from fp8moe.bench.shapes import Shape
from fp8moe.bench.tune.measure import ALWAYS_BF16
from fp8moe.config import FP8Config
from fp8moe.distributed import Dispatch, Exchange, ep_moe_forward
from fp8moe.gemm.tuning import decided_by
from fp8moe.quantize.weight_cache import WeightCache

PLAIN, TOKENS_ONCE = "BF16 plain", "BF16 tokens once"
BF16_DISPATCH, FP8_DISPATCH, CAPACITY = "fp8moe BF16 dispatch", "fp8moe FP8 dispatch", "fp8moe FP8 dispatch, capacity"
MIN_SQNR_DB, MIN_BF16_SQNR_DB = 21.5, 40.0
"""Of FP8 layers whose scales are powers of two, and of BF16's in another order."""
ROOM = 1.05
"""Rows that a rank's experts have room for, over the most that any gets: what a router that changes needs some of."""
IN_FP8 = FP8Config(allow_bf16=False)


@dataclass(frozen=True)
class Way:
    """One of them."""

    name: str
    over: Callable[[Exchange], Op]
    """The operation, by a transport."""
    dispatch: Dispatch | None
    """In what a token travels, once to a rank; None: each choice travels, in BF16."""
    min_sqnr_db: float
    reads_host: bool = True
    """Whether the host waits for the device; if it does not, a CUDA graph can be captured."""
    release: Callable[[], object] = lambda: None
    """Gives back what it holds between steps."""

    @property
    def is_ours(self) -> bool:
        """Whether its failure fails the run."""
        return self.dispatch is not None


def compiler(device: torch.device) -> Callable[[Function], Function]:
    """Of the baselines' elementwise parts. As in training, one function meets several numbers of rows, and becomes
    dynamic in those alone."""
    return torch.compile(fullgraph=True) if device.type == "cuda" else as_it_is


def ways_of(shape: Shape, drawn: RankProblem, device: torch.device) -> list[Way]:
    """All of them, the baseline first. BF16 experts of ours run on a GPU alone: a CPU always emulates FP8."""
    compile_ = compiler(device)
    max_rows = max(sum(drawn.group_sizes(rank)) for rank in range(len(drawn.ids)))
    caches: list[WeightCache] = []

    def ours(dispatch: Dispatch, config: FP8Config = IN_FP8, **options: Any) -> Callable[[Exchange], Op]:
        return lambda exchange: partial(_layer, exchange, dispatch=dispatch, config=config, **options)

    def cached(exchange: Exchange) -> Op:
        def op(*arguments: Tensor) -> Tensor:
            if not caches:
                caches.extend(map(WeightCache, arguments[3:]))
            return _layer(exchange, *arguments, dispatch=Dispatch.FP8, config=IN_FP8, weight_caches=tuple(caches))

        return op

    in_bf16 = Way(TOKENS_ONCE, lambda exchange: partial(_in_bf16, exchange), Dispatch.BF16, MIN_BF16_SQNR_DB)
    kept, fp8 = FP8Config(allow_bf16=False, keep_quantized_weights=True), Dispatch.FP8
    room: dict[str, Any] = {"capacity": shape["T"], "max_rows": max(1, int(ROOM * max_rows))}
    return [
        Way(PLAIN, lambda exchange: plain_layer(exchange, compile_), None, MIN_BF16_SQNR_DB),
        *([in_bf16] if device.type == "cuda" else []),
        Way(BF16_DISPATCH, ours(Dispatch.BF16), Dispatch.BF16, MIN_SQNR_DB),
        Way(FP8_DISPATCH, ours(fp8), fp8, MIN_SQNR_DB),
        Way(f"{FP8_DISPATCH}, weights kept", ours(fp8, kept), fp8, MIN_SQNR_DB),
        Way(f"{FP8_DISPATCH}, cached", cached, fp8, MIN_SQNR_DB, release=caches.clear),
        Way(CAPACITY, ours(fp8, **room), fp8, MIN_SQNR_DB, reads_host=False),
    ]


def experts_alone(device: torch.device) -> dict[str, Op]:
    """The experts on rows that are there, in BF16 and in FP8: of the first arguments of `swiglu_experts`."""
    in_bf16 = plain_experts(compiler(device))
    return {"BF16 experts alone": in_bf16, "fp8moe experts alone": partial(swiglu_experts, config=IN_FP8)}


def _layer(
    exchange: Exchange, hidden: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, **options: Any
) -> Tensor:
    return ep_moe_forward(hidden, ids, weights, w_gate_up, w_down, exchange, **options)


def _in_bf16(exchange: Exchange, *arguments: Tensor) -> Tensor:
    with decided_by(ALWAYS_BF16):
        return _layer(exchange, *arguments, dispatch=Dispatch.BF16, config=FP8Config())
