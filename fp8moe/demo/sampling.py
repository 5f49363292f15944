"""Text written by a trained model."""

import torch

from fp8moe.demo.model import MoELanguageModel


@torch.no_grad()
def continue_text(
    model: MoELanguageModel, prompt: bytes, length: int, context: int, temperature: float, seed: int
) -> bytes:
    """`length` bytes that go on from `prompt`, each as the model expects it after the last `context` bytes."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(length):
        tokens_BS = torch.tensor([list(text[-context:])], device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits_BSV, _ = model(tokens_BS)
        probabilities = (logits_BSV[0, -1] / temperature).softmax(dim=-1).cpu()
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(text[len(prompt) :])
