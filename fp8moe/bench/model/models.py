"""The models that the benchmark builds: classes of transformers, of full width and few layers, with random weights.

The vocabulary shrinks with the layers, so that embedding and head keep the share that they have in the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BenchModel:
    """A model of transformers."""

    name: str
    layers: int
    """Of the whole model."""
    vocabulary: int
    """Likewise."""
    attention: str
    """`attn_implementation`."""
    configure: Callable[..., Any]
    """From `num_hidden_layers` and `vocab_size` to its configuration; imports transformers."""
    changed: str = ""
    """What differs from the model of that name, besides the layers and the vocabulary."""

    def config(self, layers: int) -> Any:
        """The `PretrainedConfig` of the model with so many layers."""
        share = self.vocabulary * layers / self.layers
        return self.configure(num_hidden_layers=layers, vocab_size=max(-(-int(share) // 128) * 128, 512))


def _qwen3(**sizes: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, **sizes,
    )  # fmt: skip


def _mixtral(**sizes: int) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**sizes)  # its defaults are Mixtral-8x7B


def _deepseek_v3(**sizes: int) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(n_routed_experts=32, n_group=1, topk_group=1, first_k_dense_replace=0, **sizes)


def _gpt_oss(**sizes: int) -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(num_local_experts=32, **sizes)


def _tiny(**sizes: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, **sizes,
    )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        BenchModel("qwen3-30b-a3b", 48, 151936, "sdpa", _qwen3),
        BenchModel("mixtral-8x7b", 32, 32000, "sdpa", _mixtral),
        BenchModel("deepseek-v3-like", 58, 129280, "sdpa", _deepseek_v3, "32 experts instead of 256, in one group"),
        BenchModel("gpt-oss-20b", 24, 201088, "eager", _gpt_oss),
        BenchModel("tiny", 2, 512, "sdpa", _tiny, "for a look at the command itself"),
    )
}
"""By name."""
