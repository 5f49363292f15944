"""A plain training loop around FP8 experts: a model of bytes learns the text of this file.

    python examples/training_loop.py

It takes seconds, and runs anywhere: on Hopper GPUs in FP8 where that is faster, on other GPUs in BF16, on a CPU in
emulated FP8.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8moe import SwiGLUExperts

CONTEXT, HIDDEN, INTERMEDIATE, EXPERTS = 8, 128, 128, 4
STEPS, MICROBATCHES, TOKENS = 25, 2, 256


class MoE(nn.Module):
    """A router, which chooses two experts for each token, and the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        # The weights stay the same for all microbatches of a step: with a cache they are quantized once a step.
        self.experts = SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE, cache_weights=True)

    def forward(self, hidden: Tensor) -> Tensor:
        topk_weights, topk_ids = self.router(hidden).softmax(dim=-1).topk(2)  # (T, k) each
        return self.experts(hidden, topk_ids, topk_weights)  # (T, H)


class ByteModel(nn.Sequential):
    """From the last `CONTEXT` bytes `(T, CONTEXT)` to the logits `(T, 256)` of the next one."""

    def __init__(self) -> None:
        embedding = nn.Embedding(256, HIDDEN // CONTEXT)
        super().__init__(embedding, nn.Flatten(), MoE(), nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False))


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = text.unfold(0, CONTEXT + 1, 1).to(device)  # each: a context, and the byte that follows
    model = ByteModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    for step in range(1, STEPS + 1):
        step_loss = torch.zeros((), device=device)
        for _ in range(MICROBATCHES):
            batch = windows[torch.randint(len(windows), (TOKENS,), device=device)]
            loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1]) / MICROBATCHES
            loss.backward()  # gradients add up over the microbatches
            step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 5 == 0:
            print(f"step {step:3d}  loss {step_loss.item():.3f}")


if __name__ == "__main__":
    main()
