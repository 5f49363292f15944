"""`moe_forward`: everything between the router and the layer's output."""

from torch import Tensor

from fp8moe.autograd.experts import routed_experts
from fp8moe.autograd.grouped_mm import DEFAULT_CONFIG
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
from fp8moe.autograd.validate import check_activation, check_moe
from fp8moe.config import FP8Config, check_config
from fp8moe.gate import SWIGLU, Gate, GatedActivation


def moe_forward(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate_up: Weight,
    w_down: Tensor,
    *,
    config: FP8Config = DEFAULT_CONFIG,
    gate: Gate | None = None,
    biases: Biases = NO_BIASES,
    interleaved: bool = False,
    main_grads: MainGrads = NO_MAIN_GRADS,
    weight_caches: WeightCaches = NO_CACHES,
) -> Tensor:
    """Send each token through the experts that the router chose for it, and add up what they return, weighted.

    Each token is read where it lies: gathering, padding and quantizing are one pass. The router's weight scales the
    activation, so that combining is a plain sum, in the order of a token's choices: bits repeat. Nothing here reads
    the device on the host (`KernelPreference.EMULATED` on CUDA excepted).

    Args:
        hidden: `(T, H)` bf16, fp16 or fp32, any strides; `H` any size. It is saved for backward where that takes no
            more memory than an FP8 copy of each row: PyTorch raises an error if it has been changed in place by then.
        topk_ids: integers `(T, k)`: the experts of each token. An id outside `0..E-1` adds nothing (dropped, or the
            expert of another rank).
        topk_weights: any float dtype `(T, k)`: the router's weight of each choice.
        w_gate_up, w_down, config, gate, biases, interleaved, main_grads, weight_caches: as in `swiglu_experts`.

    Returns:
        `(T, H)`, in the dtype of `hidden`, under autocast in the autocast dtype. Gradients reach `hidden`,
        `topk_weights`, the weights and the biases. It can be differentiated once.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `swiglu_experts`.
    """
    check_config(config)
    mlp = checked_mlp(
        hidden, topk_ids, topk_weights, w_gate_up, w_down, gate, biases, interleaved, main_grads, weight_caches
    )
    return routed_experts(hidden, topk_ids, topk_weights, mlp, biases[1], config)


def checked_mlp(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate_up: Weight, w_down: Tensor, gate: Gate | None,
    biases: Biases, interleaved: bool, main_grads: MainGrads, weight_caches: WeightCaches,
) -> MlpWeights:  # fmt: skip
    """Check these arguments of `moe_forward`; what the experts compute with."""
    gate = SWIGLU if gate is None else gate
    check_activation(gate, biases, interleaved, w_gate_up, w_down)
    check_moe(hidden, topk_ids, topk_weights, w_gate_up, w_down, main_grads, weight_caches, gate.projections)
    act = GatedActivation(w_down.shape[2], gate, biases[0], interleaved)
    return MlpWeights(w_gate_up, w_down, act, main_grads, weight_caches)
