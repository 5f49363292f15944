"""A decoder-only Mixture-of-Experts language model over bytes, on one page.

A suffix on a tensor's name gives its shape:

    B sequences   S positions   T = B * S tokens   D model width   N heads   C channels of a head
    E experts     K experts chosen for a token     V = 256 byte values
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8moe import SwiGLUExperts
from fp8moe.demo.experts import BF16Experts
from fp8moe.demo.settings import Precision, RunConfig

VOCABULARY = 256


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
    """Causal multi-head self-attention with rotary positions and normalized queries and keys."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        init_weight(self.qkv.weight)
        init_weight(self.out.weight, residual_writers=2 * config.layers)

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv_BSNC = self.qkv(x_BSD).unflatten(-1, (3 * self.heads, -1))
        q_BNSC, k_BNSC, v_BNSC = qkv_BSNC.transpose(1, 2).chunk(3, dim=1)
        q_BNSC, k_BNSC = (rotate(F.rms_norm(x, x.shape[-1:])).to(v_BNSC.dtype) for x in (q_BNSC, k_BNSC))
        mixed_BNSC = F.scaled_dot_product_attention(q_BNSC, k_BNSC, v_BNSC, is_causal=True)
        out: Tensor = self.out(mixed_BNSC.transpose(1, 2).flatten(2))
        return out


class MoE(nn.Module):
    """A top-k router in fp32 and SwiGLU experts in the run's precision."""

    def __init__(self, config: RunConfig, precision: Precision) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        sizes = (config.experts, config.hidden, config.intermediate)
        self.experts = SwiGLUExperts(*sizes, config=config.fp8) if precision == "fp8" else BF16Experts(*sizes)
        init_weight(self.router.weight)
        init_weight(self.experts.w_gate_up)
        init_weight(self.experts.w_down, residual_writers=2 * config.layers)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output `(B, S, D)` and its load-balancing loss."""
        x_TD = x_BSD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):  # routing decides: it is worth fp32
            probs_TE = self.router(x_TD.float()).softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        return y_TD.view_as(x_BSD), load_balancing_loss(probs_TE, ids_TK)


class Block(nn.Module):
    """Attention, then experts, each on a normalized copy of the residual stream."""

    def __init__(self, config: RunConfig, precision: Precision) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = MoE(config, precision)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        y_BSD, balance = self.moe(self.moe_norm(x_BSD))
        return x_BSD + y_BSD, balance


class MoELanguageModel(nn.Module):
    """Bytes to the logits of the byte that follows. The same seed gives the same parameters in every precision."""

    def __init__(self, config: RunConfig, precision: Precision) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.hidden)
        self.blocks = nn.ModuleList(Block(config, precision) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)  # so the first loss is ln 256, whatever the seed

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Takes byte values, int64 `(B, S)`; returns fp32 logits `(B, S, V)` and the layers' mean balance loss."""
        x_BSD = self.embedding(tokens_BS)
        balances = []
        for block in self.blocks:
            x_BSD, balance = block(x_BSD)
            balances.append(balance)
        logits_BSV = self.head(self.norm(x_BSD)).float()
        return logits_BSV, torch.stack(balances).mean()
