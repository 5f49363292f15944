"""`ep_moe_forward`: `moe_forward` with the experts on several ranks."""

from dataclasses import replace
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fp8moe.autograd.experts import at_most_fp32
from fp8moe.autograd.grouped_mm import DEFAULT_CONFIG
from fp8moe.autograd.main_grad import active_ddp, is_of
from fp8moe.autograd.mlp_weights import (
    NO_BIASES,
    NO_CACHES,
    NO_MAIN_GRADS,
    Biases,
    MainGrads,
    MlpWeights,
    Weight,
    WeightCaches,
)
from fp8moe.autograd.moe import checked_mlp
from fp8moe.checks import check_same_device
from fp8moe.config import FP8Config, check_config
from fp8moe.distributed.exchange import Exchange, TorchExchange, exchange_of
from fp8moe.distributed.in_bf16 import ep_in_bf16
from fp8moe.distributed.in_fp8 import ep_in_fp8
from fp8moe.distributed.plan import Agreement, Room, pack_all, pack_within
from fp8moe.gate import Gate
from fp8moe.quantize.messages import Choices

Group = dist.ProcessGroup | DeviceMesh | Exchange | None


class Dispatch(Enum):
    """In what rows travel to the experts, in forward and in backward. They come back in BF16 in any case."""

    FP8 = "fp8"
    """E4M3, with a scale for each 1 x 128 tile: 1 byte and 1/32 instead of 2. Scales are powers of two, whatever
    `FP8Config.scale_format` is, and the experts compute in FP8, whatever `KernelPreference.AUTO` would take."""
    BF16 = "bf16"
    """The experts compute as they do in `moe_forward`: `AUTO` may take BF16, on each rank by the rows that it gets."""


@torch.compiler.disable(reason="ep_moe_forward runs as it is, between two graphs: compile without fullgraph=True")
def ep_moe_forward(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate_up: Weight,
    w_down: Tensor,
    group: Group,
    *,
    dispatch: Dispatch = Dispatch.FP8,
    capacity: int | None = None,
    max_rows: int | None = None,
    dropped: Tensor | None = None,
    config: FP8Config = DEFAULT_CONFIG,
    gate: Gate | None = None,
    biases: Biases = NO_BIASES,
    interleaved: bool = False,
    main_grads: MainGrads = NO_MAIN_GRADS,
    weight_caches: WeightCaches = NO_CACHES,
) -> Tensor:
    """Send each token to the ranks that have the experts it chose, and add up what comes back, weighted.

    The `P` ranks of `group` have `E` experts each: expert `e` of all `P * E` is number `e % E` of rank `e // E`. All
    ranks call this alike, with tokens of their own, any number of them or none, and run backward alike. `H`, `k`, `E`,
    `dispatch`, `capacity`, and whether `hidden`, `topk_weights` and anything at all get a gradient, must be the same.

    A token travels to a rank once, however many of its experts are there, and is quantized once. Its rows are added up
    there, in fp32 and in the order of its choices, and travel back as one row in bf16. At home what came back is added
    up in fp32, in the order of the first choices of each rank. So bits repeat; and with `Dispatch.FP8` and
    `ScaleFormat.POW2`, where no two experts of a token share a rank, output and gradients of `hidden` and
    `topk_weights` have the bits of `moe_forward` with all experts. docs/distributed.md says what else is promised.

    Args:
        hidden: `(T, H)` bf16, fp16 or fp32, any strides: the tokens of this rank.
        topk_ids: integers `(T, k)`: the experts of each token, numbered `0..P*E-1`. Any other id adds nothing.
        topk_weights: any float dtype `(T, k)`: the router's weight of each choice.
        w_gate_up: `(E, 2I, H)`, or a pair, as in `swiglu_experts`: of this rank's experts.
        w_down: `(E, H, I)`, likewise.
        group: the ranks that share the experts: a process group, a mesh of one dimension, or another transport; None
            is all ranks.
        dispatch: in what rows travel.
        capacity: how many tokens at most travel from one rank to another. None sends all, and the host waits for the
            device once, in forward, to read how many. With a capacity the host never waits: messages of as many tokens
            travel whether or not they are full, so that a CUDA graph can be captured. What does not fit is left out,
            the last tokens first; with a capacity of `T` or more everything fits.
        max_rows: with `capacity`: how many choices at most the experts of a rank compute. None is `P * capacity * k`,
            which is always enough, and far more than is needed: memory grows with it, time does not. What does not fit
            is left out, the last tokens of all ranks first.
        dropped: int64 `()` on the device of `hidden`, with `capacity`: the number of choices that were left out on this
            rank, as they left or as they arrived, is added to it.
        config: of the experts' computation.
        gate, biases, interleaved, main_grads, weight_caches: as in `swiglu_experts`.

    Returns:
        `(T, H)`, in the dtype of `hidden`, under autocast in the autocast dtype. Gradients reach `hidden`,
        `topk_weights`, the weights and the biases; those of weights and biases are of all tokens that came here. It can
        be differentiated once. Compiled code runs it as it is, between two graphs.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `moe_forward`; and for `group`, `dispatch`, `capacity`,
            `max_rows` and `dropped`. Without a capacity also, on all ranks, if the ranks do not call it alike.
        RuntimeError: without a capacity, while a CUDA graph is captured.
    """
    check_config(config)
    mlp = checked_mlp(
        hidden, topk_ids, topk_weights, w_gate_up, w_down, gate, biases, interleaved, main_grads, weight_caches
    )
    check_options(dispatch, capacity, max_rows)
    _check_dropped(dropped, capacity, hidden)
    exchange = exchange_of(group)
    _check_is_not_averaged(mlp, exchange)
    weights, in_fp8 = at_most_fp32(topk_weights), dispatch is Dispatch.FP8
    agreed, choices = _agreement(hidden, weights, mlp, biases, in_fp8), Choices(topk_ids, weights, w_down.shape[0])
    with torch.no_grad():  # the autograd functions that send the messages know where gradients go
        if capacity is None:
            depart = pack_all(hidden, choices, in_fp8, exchange, agreed)
        else:
            depart = pack_within(hidden, choices, in_fp8, exchange, Room(capacity, max_rows, dropped))
    if in_fp8:
        return ep_in_fp8(hidden, weights, mlp, biases[1], depart, replace(config, allow_bf16=False))
    return ep_in_bf16(hidden, weights, mlp, biases[1], depart, config)


def _agreement(hidden: Tensor, weights: Tensor, mlp: MlpWeights, biases: Biases, in_fp8: bool) -> Agreement:
    tensors = (hidden, weights, *mlp.parts, *biases)
    d_hidden, d_weights, *others = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors
    )
    backward = d_hidden or d_weights or any(others)
    return Agreement(
        hidden.shape[1], mlp.w_down.shape[0], weights.shape[1], in_fp8, d_hidden, d_weights, backward
    )  # fmt: skip


def _check_is_not_averaged(mlp: MlpWeights, exchange: Exchange) -> None:
    """DDP must not take the experts of several ranks for copies of each other."""
    ddp = active_ddp()
    if ddp is None or not isinstance(exchange, TorchExchange) or not any(is_of(ddp, part) for part in mlp.parts):
        return
    shared = {*dist.get_process_group_ranks(exchange.group)} & {*dist.get_process_group_ranks(ddp.process_group)}
    if len(shared) > 1:
        raise ValueError(
            "the experts' weights are parameters of a DistributedDataParallel over the ranks that share the experts: "
            "it has given all of these ranks the same ones. Before DDP wraps the model, call "
            "fp8moe.distributed.exclude_from_ddp(model), or, where the weights are not of ExpertParallelExperts, "
            "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)"
        )


def check_options(dispatch: object, capacity: object, max_rows: object) -> None:
    """Check what `ep_moe_forward` takes beside tensors; see there."""
    if not isinstance(dispatch, Dispatch):
        raise TypeError(f"dispatch is {dispatch!r}; it must be a fp8moe.distributed.Dispatch, such as Dispatch.FP8")
    if capacity is None and max_rows is not None:
        raise ValueError(_WITHOUT_CAPACITY.format("max_rows"))
    for name, value in (("capacity", capacity), ("max_rows", max_rows)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an int or None")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


_WITHOUT_CAPACITY = "{} is given without a capacity, and then nothing is left out; pass capacity too"


def _check_dropped(dropped: object, capacity: int | None, hidden: Tensor) -> None:
    if dropped is None:
        return
    if capacity is None:
        raise ValueError(_WITHOUT_CAPACITY.format("dropped"))
    if not isinstance(dropped, Tensor) or dropped.dtype is not torch.int64 or dropped.dim():
        raise TypeError(
            f"dropped is {dropped!r}; it must be an int64 tensor of no dimensions: torch.zeros((), dtype=torch.int64)"
        )
    check_same_device(dropped, "dropped", hidden, "hidden")
