"""A run small enough to train in a test."""

import json
from pathlib import Path
from typing import Any

from fp8moe.__main__ import main
from fp8moe.demo.settings import RunConfig

STEPS = 8
_TINY: dict[str, Any] = {
    "layers": 1, "experts": 4, "seq_len": 32, "batch_size": 4, "steps": STEPS, "warmup": 2, "eval_every": 3,
    "eval_batches": 2, "checkpoint_every": 3, "device": "cpu",
}  # fmt: skip


def tiny_config(**changes: Any) -> RunConfig:
    return RunConfig(**(_TINY | changes))


def tiny_flags(**changes: Any) -> list[str]:
    """The flags of `tiny_config(**changes)`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in (_TINY | changes).items()]


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
