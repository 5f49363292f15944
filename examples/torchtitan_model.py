"""A Mixture-of-Experts model of torchtitan, trained with FP8 experts: it learns to count.

    pip install 'fp8moe[titan]'
    python examples/torchtitan_model.py

torchtitan's own trainer takes the same overrides from its command line, and nothing else changes:

    --override.imports fp8moe.integrations.torchtitan.experts fp8moe.integrations.torchtitan.selective_ac
"""

import torch
from torch.nn.functional import cross_entropy
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import Qwen3Model, qwen3_configs

from fp8moe.integrations.torchtitan import report

SEQUENCES, LENGTH, STEPS, EXPERTS, EXPERTS_PER_TOKEN = 4, 32, 15, 8, 2


def small_model() -> Qwen3Model.Config:
    """torchtitan's debug model, of which a CPU can train a part: two layers, eight experts."""
    config = qwen3_configs["debugmodel_moe"](attn_backend="flex")
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        routed, router = layer.moe.routed_experts, layer.moe.router
        layer.moe.num_experts = router.num_experts = router.gate.out_features = EXPERTS
        routed.inner_experts.num_experts = routed.token_dispatcher.num_experts = EXPERTS
        router.top_k = routed.token_dispatcher.top_k = EXPERTS_PER_TOKEN
        routed.inner_experts.hidden_dim = 256
    return config


def batch(vocabulary: int, device: torch.device) -> torch.Tensor:
    """Tokens `(SEQUENCES, LENGTH)` that count up from a random one, in steps of one to three."""
    start = torch.randint(vocabulary, (SEQUENCES, 1), device=device)
    step = torch.randint(1, 4, (SEQUENCES, 1), device=device)
    return (start + step * torch.arange(LENGTH, device=device)) % vocabulary


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = small_model()
    apply_overrides(OverrideConfig(imports=["fp8moe.integrations.torchtitan.experts"]), config)
    model = config.build().to(device)
    model.init_states(buffer_device=device)
    print(report(model, tokens=SEQUENCES * LENGTH))

    positions = torch.arange(LENGTH, device=device).expand(SEQUENCES, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        tokens = batch(64, device)
        logits = model(tokens, positions)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 5 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
