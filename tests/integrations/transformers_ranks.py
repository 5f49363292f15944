"""One rank of `test_transformers_distributed.py`: `python -m tests.integrations.transformers_ranks FOLDER RANK`.

It loads the model in FOLDER as transformers distributes it, trains, and writes what it saw there.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.distributed import DistributedConfig

import fp8moe.integrations.transformers as hf
from tests.integrations.transformers_support import batch

RANKS = 2
WAYS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tp_size": RANKS, "tp_plan": "auto"},
    "expert parallel": {"tp_size": RANKS, "tp_plan": "auto", "ep_size": RANKS},
    "expert parallel, all-to-all": {"fsdp_size": RANKS, "ep_size": RANKS},
    "fsdp": {"fsdp_size": RANKS},
}


def steps(model: Any) -> dict[str, Any]:
    """Three steps, and what runs the experts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    losses = []
    for step in range(3):
        loss = model(batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "runs": {entry.runs for entry in hf.report(model).experts}}


def main(folder: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.register(strict=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {}
    for way, options in WAYS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, experts_implementation="fp8moe", distributed_config=DistributedConfig(**options)
        )
        found[way] = steps(model.train())
    torch.save(found, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
