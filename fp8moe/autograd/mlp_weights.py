"""The weights of expert MLPs as their callers have them, what is computed with them, and how biases join."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.gate import GatedActivation
from fp8moe.quantize.gathered import GatheredWeight
from fp8moe.quantize.weight_cache import WeightCache
from fp8moe.quantize.weights import Split

Weight = Tensor | tuple[Tensor, Tensor]
"""`w_gate_up` `(E, 2I, H)`, or `w_gate` and `w_up`, `(E, I, H)` each; without a gate `w_up` `(E, I, H)`."""
Biases = tuple[Tensor | None, Tensor | None]
"""Of gate and up `(E, 2I)`, or of up alone `(E, I)`, and of the down projection `(E, H)`."""
MainGrads = tuple[Tensor | None, Tensor | None]
"""Of `w_gate_up` and `w_down`."""
WeightCaches = tuple[WeightCache | None, WeightCache | None]
"""Of `w_gate_up` and `w_down`."""
NO_BIASES: Biases = (None, None)
NO_MAIN_GRADS: MainGrads = (None, None)
NO_CACHES: WeightCaches = (None, None)


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """What an expert MLP has, but for the bias of its down projection, which is added outside (`add_down_bias`)."""

    w_gate_up: Weight
    w_down: Tensor
    act: GatedActivation
    """With its bias."""
    main_grads: MainGrads
    weight_caches: WeightCaches

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All weights."""
        return (*((self.w_gate_up,) if isinstance(self.w_gate_up, Tensor) else self.w_gate_up), self.w_down)

    @property
    def split(self) -> Split:
        """How a `w_gate_up` that is one tensor is divided."""
        if not self.act.gate.has_gate:
            return Split.WHOLE
        return Split.INTERLEAVED if self.act.interleaved else Split.HALVES

    @property
    def is_gathered(self) -> bool:
        """Whether there are only FP8 operands of a weight."""
        parts = (self.w_gate_up,) if isinstance(self.w_gate_up, Tensor) else self.w_gate_up
        return any(isinstance(part, GatheredWeight) for part in (*parts, self.w_down))

    @property
    def handles(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the sources of `w_gate_up` and `w_down` in FP8, if they have any."""
        cache_gate_up, cache_down = self.weight_caches
        return _handle_of(self.w_gate_up, cache_gate_up), _handle_of(self.w_down, cache_down)


def _handle_of(w: Weight, cache: WeightCache | None) -> Tensor | None:
    if isinstance(w, GatheredWeight):
        return w.handle
    if not isinstance(w, Tensor) and isinstance(w[0], GatheredWeight):
        return w[0].pair_handle
    return None if cache is None else cache.handle


def is_stored_transposed(w: Tensor) -> bool:
    """Whether `w` `(E, N, K)` is a view of a contiguous `(E, K, N)`."""
    return not w.is_contiguous() and w.transpose(1, 2).is_contiguous()


def expert_weights_of_rows(ends: Tensor, num_rows: int, row_weights: Tensor | None) -> Tensor:
    """fp32 `(M, E)`: in the column of its expert the weight of each row, one if there are no weights, else zeros.

    Args:
        ends: int32 `(E,)`, of `ends_within`.
        num_rows: `M`.
        row_weights: any float dtype `(M,)`.
    """
    rows = torch.arange(num_rows, device=ends.device, dtype=ends.dtype)[:, None]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    own = (rows >= starts) & (rows < ends)  # (M, E)
    return own.float() if row_weights is None else torch.where(own, row_weights[:, None].float(), 0.0)


def expert_weights_of_tokens(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """fp32 `(T, E)`: how much of each expert's output a token gets; ids of no expert add nothing."""
    ids = topk_ids.long()
    dropped = (ids < 0) | (ids >= num_experts)
    weights = topk_weights.new_zeros((ids.shape[0], num_experts + 1), dtype=torch.float32)
    return weights.scatter_add(1, ids.masked_fill(dropped, num_experts), topk_weights.float())[:, :num_experts]


def add_down_bias(out: Tensor, expert_weights: Tensor, bias: Tensor) -> Tensor:
    """`out + expert_weights @ bias` in the dtype of `out`, summed in fp32; gradients reach all three.

    A weight scales what its row's expert returns, the bias included. The FP8 op folds it into the activation, before
    the down projection; so what it adds of the bias is this product, of `(T or M, E)` and `(E, H)`.
    """
    return torch.addmm(out, expert_weights.to(out.dtype), bias.to(out.dtype))
