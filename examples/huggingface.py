"""A Mixture-of-Experts model of Hugging Face transformers, trained with FP8 experts: it learns to count.

    pip install 'fp8moe[hf]'
    python examples/huggingface.py

The model is small and random. For one of your own, call `from_pretrained(..., experts_implementation="fp8moe")`.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from fp8moe.integrations.transformers import report  # the import registers "fp8moe"

VOCABULARY, SEQUENCES, LENGTH, STEPS = 64, 8, 32, 20


def batch(device: torch.device) -> torch.Tensor:
    """Tokens `(SEQUENCES, LENGTH)` that count up from a random one, in steps of one to three."""
    start = torch.randint(VOCABULARY, (SEQUENCES, 1), device=device)
    step = torch.randint(1, 4, (SEQUENCES, 1), device=device)
    return (start + step * torch.arange(LENGTH, device=device)) % VOCABULARY


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="fp8moe").to(device)
    print(report(model, tokens=SEQUENCES * LENGTH))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, STEPS + 1):
        tokens = batch(device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 5 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
