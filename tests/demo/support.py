"""A run small enough to train in a test."""

import json
from pathlib import Path
from typing import Any

from fp8moe.__main__ import main
from fp8moe.demo.settings import ModelConfig, RunConfig

TINY = ModelConfig(layers=1, hidden=128, intermediate=128, experts=4, top_k=2, heads=4)
STEPS = 8


def tiny_config(**changes: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "model": TINY, "seq_len": 32, "batch_size": 4, "steps": STEPS, "warmup": 2, "eval_every": 3, "eval_batches": 2,
        "checkpoint_every": 3, "device": "cpu",
    }  # fmt: skip
    return RunConfig(**(defaults | changes))


def tiny_flags(**changes: Any) -> list[str]:
    """The flags of `tiny_config(**changes)`."""
    config = tiny_config(**changes)
    sizes = ("layers", "experts")
    names = (
        "seq_len",
        "batch_size",
        "steps",
        "lr",
        "warmup",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "device",
    )
    flags = [f"--precision={','.join(config.precision)}"]
    return flags + [f"--{name.replace('_', '-')}={config.option(name)}" for name in sizes + names]


def train(*flags: object) -> int:
    """`python -m fp8moe train`, in this process."""
    return main(["train", *map(str, flags)])


def metrics(run: Path, precision: str) -> list[dict[str, float]]:
    """The recorded steps without what depends on the clock."""
    lines = (run / precision / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("seconds", "tokens_per_second")}
        for line in lines
    ]
