"""A model with experts that somebody else wrote, which fp8moe computes from the second half of training on.

    pip install fp8moe
    python examples/convert.py

`Experts` stands for code that you would rather not touch. Parameters, optimizer and checkpoints stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8moe

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, STEPS = 4, 128, 256, 128, 40


class Experts(nn.Module):
    """As in many repositories: three weights, and a loop over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * HIDDEN**-0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * HIDDEN**-0.5)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, choice = torch.where(topk_ids == expert)
            act = F.silu(x[token] @ self.w1[expert].T) * (x[token] @ self.w3[expert].T)
            out = out.index_add(0, token, act @ self.w2[expert].T * topk_weights[token, choice, None])
        return out


class Model(nn.Module):
    """Two layers of experts, after a router each."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(HIDDEN, EXPERTS, bias=False) for _ in range(2))
        self.experts = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for router, experts in zip(self.routers, self.experts, strict=True):
            topk_weights, topk_ids = router(x).softmax(-1).topk(2)
            x = x + experts(x, topk_ids, topk_weights)
        return x


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, target = torch.randn(2, TOKENS, HIDDEN, device=device)
    for step in range(1, STEPS + 1):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
        if step == STEPS // 2:
            print(fp8moe.convert(model, strict=True))


if __name__ == "__main__":
    main()
