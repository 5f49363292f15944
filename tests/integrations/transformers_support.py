"""Small models and experts of transformers, and how to run them."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fp8moe.integrations.transformers", exc_type=ImportError)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
    },
    "Mixtral": {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 8},
    "DeepseekV3": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "Olmoe": {"intermediate_size": 128, "num_key_value_heads": 2, "num_experts": 8},
}


GPT_OSS = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8}


def build(name: str, implementation: str | None = "fp8moe", *, seed: int = 0, **options: Any) -> Any:
    """A small model, the same parameters for every implementation."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        **(COMMON | (GPT_OSS if name == "GptOss" else MODELS[name]) | options)
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, dtype=torch.float32
    )


def batch(seed: int, rows: int = 4) -> Tensor:
    """Sequences `(rows, 32)` that count up from a random token in steps of one to three."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, most, (rows, 1), generator=generator) for most in (64, 4))
    return (start + step * torch.arange(32)) % 64


def experts_class(family: str, prefix: str) -> tuple[type[Any], type[Any]]:
    """The experts class of a family of models, and the class of its configuration."""
    modeling, configuration = (
        importlib.import_module(f"transformers.models.{family}.{kind}_{family}")
        for kind in ("modeling", "configuration")
    )
    names = (f"{prefix}{suffix}" for suffix in ("TextConfig", "Config"))
    config = next(getattr(configuration, name) for name in names if hasattr(configuration, name))
    text = "Text" if hasattr(modeling, f"{prefix}TextExperts") else ""
    return getattr(modeling, f"{prefix}{text}Experts"), config


def build_experts(family: str, prefix: str, implementation: str = "fp8moe", **sizes: Any) -> Any:
    torch.manual_seed(0)
    experts, config = experts_class(family, prefix)
    module = experts(config(**sizes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    module.config._experts_implementation = implementation
    return module


def qwen_experts(implementation: str = "fp8moe", **options: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 4}
    return build_experts("qwen3_moe", "Qwen3Moe", implementation, **(sizes | options))


def aria_experts(hidden_size: int = 128) -> Any:
    return build_experts("aria", "Aria", hidden_size=hidden_size, intermediate_size=256, moe_num_experts=4)


def lfm2_experts() -> Any:
    return build_experts("lfm2_moe", "Lfm2Moe", hidden_size=128, moe_intermediate_size=256, num_experts=4)


def routed(tokens: int = 50, num_experts: int = 4, hidden_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weights, ids = torch.randn(tokens, num_experts).softmax(-1).topk(2)
    return hidden, ids, weights.detach().requires_grad_()


def run(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs and of the parameters."""
    inputs = (hidden, weights, *module.parameters())
    out = module(hidden, ids, weights)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def with_eager(module: Any) -> Any:
    eager = copy.deepcopy(module)
    eager.config._experts_implementation = "eager"
    return eager


def losses(model: Any, steps: int, microbatches: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        loss = torch.zeros(())
        for microbatch in range(microbatches):
            tokens = batch(step * microbatches + microbatch)
            part = model(tokens, labels=tokens).loss / microbatches
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss))
    return history
