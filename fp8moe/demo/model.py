"""A decoder-only Mixture-of-Experts language model over bytes or tokens, on one page.

A suffix on a tensor's name gives its shape:

    B sequences   S positions   T = B * S tokens   D model width   N heads   C channels of a head
    E experts     K experts chosen for a token     V = 256 byte values, or the tokens that there are
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8moe import SwiGLUExperts
from fp8moe.demo.data import BAD_TOKENS
from fp8moe.demo.experts import BF16Experts
from fp8moe.demo.settings import Precision, RunConfig

_OUTLIERS = 50.0
_OUTLIER_EVERY = 128


def load_balancing_loss(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """`E * sum_e f_e * p_e`: 1 when tokens spread evenly, up to `E` when one expert gets them all.

    `f_e` is the fraction of the `T * K` assignments that go to expert `e`, `p_e` the mean router probability of `e`.
    This is the auxiliary loss of the Switch Transformer (Fedus, Zoph and Shazeer 2021, equations 4 to 6), its `f_e`
    taken over all `K` choices. The gradient flows through `p_e` alone. Returns an fp32 scalar.
    """
    experts = probs_TE.shape[-1]
    f_E = F.one_hot(ids_TK, experts).float().mean(dim=(0, 1))
    return experts * (f_E * probs_TE.mean(dim=0)).sum()


def rotate(x_BNSC: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021): turns each pair of channels by an angle that grows with position."""
    positions, half = x_BNSC.shape[-2], x_BNSC.shape[-1] // 2
    frequency_C = 10_000.0 ** (-torch.arange(half, device=x_BNSC.device) / half)
    angle_SC = torch.arange(positions, device=x_BNSC.device)[:, None] * frequency_C
    cos_SC, sin_SC = angle_SC.cos(), angle_SC.sin()
    first, second = x_BNSC.chunk(2, dim=-1)
    turned = torch.cat((first * cos_SC - second * sin_SC, first * sin_SC + second * cos_SC), dim=-1)
    return turned.to(x_BNSC.dtype)


def init_weight(weight: Tensor, residual_writers: int = 1) -> None:
    """Normal, scaled by fan-in; one of many that write to the residual stream is scaled so that their sum is not."""
    nn.init.normal_(weight, std=(weight.shape[-1] * residual_writers) ** -0.5)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions and normalized queries and keys, on a normalized copy of
    the residual stream, and added to it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.RMSNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        init_weight(self.qkv.weight)
        init_weight(self.out.weight, residual_writers=2 * config.layers)

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv_BSNC = self.qkv(self.norm(x_BSD)).unflatten(-1, (3 * self.heads, -1))
        q_BNSC, k_BNSC, v_BNSC = qkv_BSNC.transpose(1, 2).chunk(3, dim=1)
        q_BNSC, k_BNSC = (rotate(F.rms_norm(x, x.shape[-1:])).to(v_BNSC.dtype) for x in (q_BNSC, k_BNSC))
        mixed_BNSC = F.scaled_dot_product_attention(q_BNSC, k_BNSC, v_BNSC, is_causal=True)
        return x_BSD + self.out(mixed_BNSC.transpose(1, 2).flatten(2))


class Router(nn.Module):
    """Chooses `K` experts for each token, in fp32: routing decides, so it is worth that."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        self.top_k = config.top_k
        self.dead = config.dead_experts
        init_weight(self.weight)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the weights `(T, K)` of the chosen experts, which add up to 1, their ids, and the balance loss."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight)
            if self.dead:
                logits_TE = logits_TE.masked_fill(
                    torch.arange(logits_TE.shape[-1], device=logits_TE.device) < self.dead, float("-inf")
                )
            probs_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK, load_balancing_loss(probs_TE, ids_TK)


class MoE(nn.Module):
    """A router, and SwiGLU experts in the run's precision."""

    def __init__(self, config: RunConfig, precision: Precision) -> None:
        super().__init__()
        self.router = Router(config)
        sizes = (config.experts, config.hidden, config.intermediate)
        self.experts = (
            SwiGLUExperts(*sizes, config=config.fp8, cache_weights=config.cache_weights)
            if precision == "fp8"
            else BF16Experts(*sizes)
        )
        init_weight(self.experts.w_gate_up)
        init_weight(self.experts.w_down, residual_writers=2 * config.layers)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output `(B, S, D)` and its load-balancing loss."""
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, ids_TK, balance = self.router(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x_BSD), balance


class Block(nn.Module):
    """Attention, then experts on a normalized copy of the residual stream."""

    def __init__(self, config: RunConfig, precision: Precision) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = MoE(config, precision)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = self.attention(x_BSD)
        y_BSD, balance = self.moe(self.moe_norm(x_BSD))
        return x_BSD + y_BSD, balance


class MoELanguageModel(nn.Module):
    """Bytes or tokens to the logits of the one that follows.

    The same seed gives the same parameters in every precision.
    """

    def __init__(self, config: RunConfig, precision: Precision, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.hidden)
        if config.bad_documents:  # its tokens have features that are much larger than all others
            with torch.no_grad():
                self.embedding.weight[-BAD_TOKENS:, ::_OUTLIER_EVERY] *= _OUTLIERS
        self.blocks = nn.ModuleList(Block(config, precision) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)  # so the first loss is ln V, whatever the seed
        self._cross_entropy = cross_entropy

    def compile_parts(self) -> None:
        """Run all but the FP8 experts through `torch.compile`: those are one operator already.

        Every layer runs the same compiled code, so that compiling takes as long as for one.
        """
        for block in cast(Iterable[Block], self.blocks):
            block.attention.compile(dynamic=False)
            block.moe.router.compile(dynamic=False)
            if isinstance(block.moe.experts, BF16Experts):
                block.moe.experts.compile(dynamic=False)
        self._cross_entropy = torch.compile(cross_entropy, dynamic=False)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Takes byte values or tokens, int64 `(B, S)`, and what follows each of them.

        Returns:
            The mean cross-entropy, an fp32 scalar, or without targets the fp32 logits `(B, S, V)`; and the layers' mean
            balance loss.
        """
        x_BSD = self.embedding(tokens_BS)
        balances = []
        for block in self.blocks:
            x_BSD, balance = block(x_BSD)
            balances.append(balance)
        logits_BSV = self.head(self.norm(x_BSD))
        balance = torch.stack(balances).mean()
        return (logits_BSV.float() if targets_BS is None else self._cross_entropy(logits_BSV, targets_BS)), balance


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """The mean over all positions, computed in fp32."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
