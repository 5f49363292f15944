"""Experts on several ranks: `ep_moe_forward`, a module for it, and FSDP2 in FP8. See docs/distributed.md."""

from fp8moe.distributed.data_parallel import exclude_from_ddp
from fp8moe.distributed.exchange import Arrival, Exchange, TorchExchange
from fp8moe.distributed.expert_parallel import Dispatch, ep_moe_forward
from fp8moe.distributed.fsdp import gather_in_fp8
from fp8moe.distributed.modules import ExpertParallelExperts

__all__ = [
    "Arrival",
    "Dispatch",
    "Exchange",
    "ExpertParallelExperts",
    "TorchExchange",
    "ep_moe_forward",
    "exclude_from_ddp",
    "gather_in_fp8",
]
