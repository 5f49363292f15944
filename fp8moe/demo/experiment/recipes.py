"""What is compared: recipes, each with the baseline that its losses are measured against."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fp8moe.config import TOKEN_TILES
from fp8moe.demo.settings import RunConfig

TRUNK = 0.4
"""The share of the steps that the branches of a seed have in common."""


@dataclass(frozen=True)
class Recipe:
    """How a run differs from the experiment's settings."""

    settings: Mapping[str, Any]
    """Fields of `RunConfig`."""
    baseline: str | None = None
    """The recipe that trains on the same data in BF16; None for a baseline."""
    branched: bool = False
    """The first `TRUNK` of the steps are those of the baseline: the run goes on from its checkpoint."""
    microbatches: int = 1
    """A step has as many microbatches of the experiment's batch size, and there are that many times fewer steps."""
    lr_factor: float = 1.0

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """The settings of a run. All recipes see as many tokens; those with one `microbatches` see the same batches."""
        parts = self.microbatches
        return replace(
            base,
            seed=seed,
            batch_size=base.batch_size * parts,
            microbatches=base.microbatches * parts,
            steps=max(1, base.steps // parts),
            warmup=base.warmup // parts,
            eval_every=base.eval_every // parts,
            eval_batches=max(1, base.eval_batches // parts),
            lr=base.lr * self.lr_factor,
            **self.settings,
        )

    def trunk_steps(self, config: RunConfig) -> int:
        """How many steps of a run with these settings are the baseline's."""
        return round(TRUNK * config.steps) if self.branched else 0


@dataclass(frozen=True)
class _Family:
    """Recipes that share all but what they say."""

    prefix: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    microbatches: int = 1
    lr_factor: float = 1.0
    branched: bool = False

    def recipes(self, others: Mapping[str, Mapping[str, Any]]) -> dict[str, Recipe]:
        """The baseline, and the others, which are in FP8 unless they say otherwise."""
        baseline = f"{self.prefix}bf16"
        made = {baseline: self._recipe({"precision": "bf16"}, None)}
        for name, settings in others.items():
            made[self.prefix + name] = self._recipe({"precision": "fp8", **settings}, baseline)
        return made

    def _recipe(self, settings: Mapping[str, Any], baseline: str | None) -> Recipe:
        return Recipe(
            {**self.settings, **settings}, baseline, self.branched, microbatches=self.microbatches,
            lr_factor=self.lr_factor,
        )  # fmt: skip


_TILE_128, _TILE_256, _TILE_512 = ({"token_tile": tile} for tile in TOKEN_TILES)
_ALL: dict[str, dict[str, Any]] = {
    # The noise floor: its sums have no order, so it differs from the baseline by rounding alone.
    "bf16-again": {"precision": "bf16", "deterministic": False},
    "fp8-128": _TILE_128,
    "fp8-256": _TILE_256,
    "fp8-512": _TILE_512,
    "fp8-pow2": {"scale_format": "pow2"},
    "fp8-activations": {"activation_storage": "fp8"},
}
RECIPES: dict[str, Recipe] = (
    _Family().recipes(_ALL)
    | _Family("branched-", branched=True).recipes(_ALL)
    | _Family("accumulated-", microbatches=2).recipes({"fp8-cache": {"cache_weights": True}})
    # Five times the learning rate, a bad document with outliers in every step, an expert that no token reaches.
    | _Family("stress-", {"bad_documents": 1 / 16, "dead_experts": 1}, lr_factor=5.0).recipes(
        {"fp8-128": _TILE_128, "fp8-256": _TILE_256}
    )
)
"""By name, baselines before what is measured against them."""

SIZES: dict[str, Any] = {
    "layers": 6, "hidden": 1024, "intermediate": 640, "experts": 32, "top_k": 4, "heads": 8, "backend": "triton",
    "seq_len": 1024, "batch_size": 32, "steps": 1000, "lr": 8e-4, "warmup": 100, "eval_every": 250, "eval_batches": 16,
    "checkpoint_every": 0, "compile": True, "token_tile": 128,
}  # fmt: skip
"""The settings of `RunConfig` that an experiment starts from: 436 million parameters with a vocabulary of 16384, at
32768 tokens a step, of which an expert gets 4096 on average. Tiles are named, so that recipes do not change with the
library's default."""
