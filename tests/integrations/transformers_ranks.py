"""One rank of `test_transformers_distributed.py`: `python -m tests.integrations.transformers_ranks FOLDER RANK RANKS`.

It loads the model in FOLDER as transformers distributes it, trains, and writes what it saw there.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

import fp8moe.integrations.transformers as hf
from fp8moe.distributed import Dispatch
from tests.integrations.transformers_support import batch

FP8 = {"ep_implementation": "fp8moe"}
BF16 = {"ep_implementation": "fp8moe_bf16"}
SHARED: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tp_size": 2, "tp_plan": "auto"},
    "expert parallel": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2},
    "expert parallel, rows in FP8": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2, **FP8},
}
"""Where both ranks have the same batch."""
OWN: dict[str, dict[str, Any]] = {
    "expert parallel, all-to-all": {"fsdp_size": 2, "ep_size": 2},
    "expert parallel, all-to-all in FP8": {"fsdp_size": 2, "ep_size": 2, **FP8},
    "expert parallel, all-to-all in FP8, checkpointing": {"fsdp_size": 2, "ep_size": 2, **FP8},
    "expert parallel, all-to-all in BF16": {"fsdp_size": 2, "ep_size": 2, **BF16},
    "fsdp": {"fsdp_size": 2},
}
"""Where each has its own."""
SAVED = "expert parallel, all-to-all in FP8"
OF_FOUR: dict[str, dict[str, Any]] = {
    "expert parallel, two copies of each expert": {"fsdp_size": 4, "ep_size": 2, **FP8},
    "expert parallel, pairs that share a batch": {"fsdp_size": 2, "tp_size": 2, "tp_plan": "auto", "ep_size": 4, **FP8},
}
WAYS = SHARED | OWN | OF_FOUR


def steps(model: Any, batches: Sequence[int]) -> list[list[float]]:
    """Three steps, with the mean of the losses of these batches; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    device, history = next(model.parameters()).device, []
    for step in range(3):
        inputs = [batch(10 * step + i).to(device) for i in batches]
        losses = [model(tokens, labels=tokens).loss for tokens in inputs]
        (torch.stack(losses).sum() / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([float(loss.detach()) for loss in losses])
    return history


SENT: set[int] = set()
"""Bytes a row of what `ep_moe_forward` sends."""


def record_traffic() -> None:
    send = dist.all_to_all_single

    exchange: Any = importlib.import_module("fp8moe.distributed.exchange")

    def recorded(received: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        SENT.add(x.shape[1])  # it sends bytes
        return send(received, x, *args, **kwargs)

    exchange.dist = SimpleNamespace(**vars(dist) | {"all_to_all_single": recorded})


def load(folder: Path, options: dict[str, Any] | None) -> Any:
    distributed = None if options is None else DistributedConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="fp8moe", distributed_config=distributed
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model.train()


def whole(model: Any) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def observed(model: Any, batches: Sequence[int]) -> dict[str, Any]:
    SENT.clear()
    losses = steps(model, batches)
    entries = hf.report(getattr(model, "module", model)).experts
    return {
        "losses": losses,
        "bytes": {*SENT},
        "runs": {entry.runs for entry in entries},
        "why": entries[0].why,
    }


def main(folder: Path, rank: int, ranks: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.register(strict=True)
    hf.register("fp8moe_bf16", strict=True, dispatch=Dispatch.BF16)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    record_traffic()
    found = {}
    if ranks == 2:
        for way, options in SHARED.items():
            found[way] = observed(load(folder, options), [0])
        for way, options in OWN.items():
            model = load(folder, options)
            if "checkpointing" in way:
                model.gradient_checkpointing_enable()
            found[way] = observed(model, [rank])
            if way == SAVED:
                for name in ("trained", "sharded"):
                    model.save_pretrained(folder / name, distributed_checkpoint=name == "sharded")
                found["trained"] = whole(model)
        found["ddp"] = observed(DistributedDataParallel(load(folder, None)), [rank])
    else:
        found["restored"] = whole(load(folder / "sharded", {"fsdp_size": 4, "ep_size": 4, **FP8}))
        for way, options in OF_FOUR.items():
            batches = [rank] if options["fsdp_size"] == 4 else [rank // 2]
            found[way] = observed(load(folder, options), batches)
    torch.save(found, folder / f"rank-{ranks}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
