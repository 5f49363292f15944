"""Plans past the GPUs that were measured: `python -m fp8moe.bench.distributed.scaling distributed.json`.

With `--against` it compares the plan with runs that were measured.

A prediction takes the times and rates of one run, the sizes of a layer, and what a network is assumed to give. What it
leaves out, docs/scaling.md says.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fp8moe.bench.distributed.calibration import WAYS, Calibration
from fp8moe.bench.distributed.traffic import BF16_BYTES, Ranks, exchanges
from fp8moe.bench.shapes import Shape, with_name
from fp8moe.distributed import Dispatch
from fp8moe.operands import BLOCK

GPUS = (8, 64, 1024)
EP_SIZES = (8, 64, 256)
"""How many ranks share the experts, where there are as many GPUs and experts."""
BITS = 8
FLOPS_A_MULTIPLY_ADD, GEMMS, PROJECTIONS = 2, 3, 3
"""Of forward and backward: each of the three projections is multiplied three times."""


@dataclass(frozen=True)
class Machines:
    """What the plan assumes, and no run has measured."""

    per_node: int = 8
    """GPUs that NVLink joins, each at the measured rate."""
    network_gbit_s: float = 400.0
    """1e9 bits a second that each GPU has to other nodes."""
    network_share: float = 0.85
    """Of which so much is reached."""
    peer_us: float = 1.0
    """What each peer beyond those of the measured ranks adds to an exchange, whatever the bytes."""
    node_limit: int | None = None
    """How many nodes at most the experts of a token lie on."""
    relay: bool = False
    """Whether a token crosses the network once to a node, and NVLink spreads it there, as DeepEP does. `TorchExchange`
    sends it to each rank."""

    @property
    def network_gb_s(self) -> float:
        """What each GPU reaches, in 1e9 bytes a second."""
        return self.network_gbit_s / BITS * self.network_share


@dataclass(frozen=True)
class ExpertParallelPlan:
    """The predicted step, forward and backward of one layer, on each GPU."""

    gpus: int
    ep: int
    """Ranks that share the experts; as many replicas of them as fit."""
    dispatch: Dispatch | None
    rows_an_expert: float
    visited: float
    """Ranks that a token goes to."""
    visited_nodes: float
    near_bytes: float
    """Over NVLink to other ranks; with relays, also what came over the network."""
    far_bytes: float
    """Over the network."""
    local_ms: float
    """Everything but the wire."""
    wire_ms: float
    hidden_ms: float
    """Of the wire, what the measured step took no longer for: it computed meanwhile, which takes no longer where the
    wire does."""
    waiting_ms: float
    """What the measured step took beyond its host, or its device and the whole wire: the device waits for launches, and
    ranks for each other."""
    host_ms: float
    gradient_ms: float
    """Once an optimizer step: the reduction of the experts' gradients over their replicas, in BF16."""
    tokens: int

    @property
    def step_ms(self) -> float:
        """If as much overlaps as in the measured step."""
        device_ms = self.local_ms + max(self.wire_ms - self.hidden_ms, 0.0)
        return max(max(self.host_ms, device_ms) + self.waiting_ms, self.bound_ms)

    @property
    def bound_ms(self) -> float:
        """If all of the shorter hid behind the longer: no overlap can do better."""
        return max(self.host_ms, self.local_ms, self.wire_ms) + self.waiting_ms

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU, through this layer alone."""
        return self.tokens / self.step_ms * 1e3


def plan_expert_parallel(
    calibration: Calibration, machines: Machines, gpus: int, ep: int, dispatch: Dispatch | None
) -> ExpertParallelPlan:
    """Predict one layer with its experts over `ep` of `gpus` ranks."""
    plan = _plan_without_overlap(calibration, machines, gpus, ep, dispatch)
    count = calibration.measured_ranks
    like = dispatch if dispatch in calibration.steps else Dispatch.FP8
    measured = _plan_without_overlap(calibration.as_measured(), machines, count, count, like)
    both_ms, wire_ms = calibration.steps[like].both_ms, measured.wire_ms
    hidden_ms = min(max(measured.local_ms + wire_ms - both_ms, 0.0), wire_ms)
    waiting_ms = max(both_ms - max(measured.host_ms, measured.local_ms + wire_ms), 0.0)
    return replace(plan, hidden_ms=hidden_ms, waiting_ms=waiting_ms)


def _plan_without_overlap(
    calibration: Calibration, machines: Machines, gpus: int, ep: int, dispatch: Dispatch | None
) -> ExpertParallelPlan:
    shape = calibration.shape
    t, k, h, i, e = shape.sizes
    ranks = Ranks(ep, machines.per_node, e, machines.node_limit)
    # The plain layer sends each choice; by symmetry as many to each rank.
    near, far = ranks.visited_near(k), ranks.visited_far(k)
    if dispatch is None:
        near, far = near / ranks.visited(k) * k, far / ranks.visited(k) * k
    elif machines.relay:
        near, far = near + far, ranks.visited_nodes(k) * (ranks.num_nodes - 1) / ranks.num_nodes
    near_bytes = far_bytes = wire_ms = 0.0
    fixed_ms = calibration.rows.fixed_ms + machines.peer_us * max(ep - calibration.measured_ranks, 0) / 1e3
    for num_bytes in exchanges(shape, dispatch):
        near_ms = t * near * num_bytes / calibration.rows.gb_s / 1e6
        far_ms = t * far * num_bytes / machines.network_gb_s / 1e6
        wire_ms += fixed_ms + max(near_ms, far_ms)
        near_bytes, far_bytes = near_bytes + t * near * num_bytes, far_bytes + t * far * num_bytes
    return ExpertParallelPlan(
        gpus=gpus, ep=ep, dispatch=dispatch, rows_an_expert=t * k * ep / e, visited=ranks.visited(k),
        visited_nodes=ranks.visited_nodes(k), near_bytes=near_bytes, far_bytes=far_bytes,
        local_ms=calibration.local_ms(dispatch, e // ep, ranks.visited(k)), wire_ms=wire_ms, hidden_ms=0.0,
        waiting_ms=0.0, host_ms=calibration.host_ms,
        gradient_ms=_all_reduce_ms(PROJECTIONS * h * i * (e // ep) * BF16_BYTES, gpus // ep, machines), tokens=t,
    )  # fmt: skip


def _all_reduce_ms(num_bytes: float, replicas: int, machines: Machines) -> float:
    """In a ring over the network: each rank sends nearly all twice."""
    return 2 * num_bytes * (replicas - 1) / replicas / machines.network_gb_s / 1e6


@dataclass(frozen=True)
class ShardedPlan:
    """The predicted step of one layer whose weights FSDP2 shards over all GPUs, with all experts on each."""

    gpus: int
    name: str
    gather_bytes: float
    """Of the experts' weights, as they travel, once."""
    gather_ms: float
    """Once; forward and backward each gather."""
    reduce_ms: float
    """Of the gradients, in BF16."""
    compute_ms: float
    tokens_to_hide: float
    """From how many tokens a GPU on the computation takes as long as the wire."""

    @property
    def step_ms(self) -> float:
        """If nothing overlaps."""
        return self.compute_ms + 2 * self.gather_ms + self.reduce_ms

    @property
    def bound_ms(self) -> float:
        """If all of the shorter hid behind the longer, which is what FSDP2 prefetches for."""
        return max(self.compute_ms, 2 * self.gather_ms + self.reduce_ms)


def plan_sharded(
    calibration: Calibration, machines: Machines, gpus: int, *, in_fp8: bool, gathered_in_fp8: bool
) -> ShardedPlan:
    """Predict one layer on each of `gpus` ranks, by the cost model of one GPU."""
    t, _, h, i, e = calibration.shape.sizes
    elements = PROJECTIONS * h * i * e
    whole = BF16_BYTES * elements
    gathered = elements * (1 + 4 / BLOCK**2) if gathered_in_fp8 else whole
    gather_ms = _ring_ms(gathered, gpus, calibration.gather_gb_s[gathered_in_fp8], machines)
    reduce_ms = _ring_ms(whole, gpus, calibration.gather_gb_s[False], machines)
    none, compute_ms = (calibration.unsharded_ms(in_fp8, gathered_in_fp8, tokens) for tokens in (0, t))
    return ShardedPlan(
        gpus=gpus,
        name="FP8 experts, FP8 gather" if gathered_in_fp8 else f"{'FP8' if in_fp8 else 'BF16'} experts, bf16 gather",
        gather_bytes=gathered,
        gather_ms=gather_ms,
        reduce_ms=reduce_ms,
        compute_ms=compute_ms,
        tokens_to_hide=max(2 * gather_ms + reduce_ms - none, 0.0) / (compute_ms - none) * t,
    )


def _ring_ms(num_bytes: float, gpus: int, near_gb_s: float, machines: Machines) -> float:
    """A gather, or a reduction and scatter: within a node all passes every GPU's NVLink; a node takes what the others
    have through all of its network ports."""
    nodes = max(gpus // machines.per_node, 1)
    near_ms = num_bytes * (gpus - 1) / gpus / near_gb_s / 1e6
    far_ms = num_bytes * (nodes - 1) / nodes / machines.per_node / machines.network_gb_s / 1e6
    return max(near_ms, far_ms)


def expert_parallel_plans(
    calibration: Calibration, machines: Machines, gpus: Sequence[int]
) -> list[ExpertParallelPlan]:
    """Of all sizes that fit, for each dispatch that was measured, the plain layer first."""
    known = [way for way in WAYS if way is not None or None in calibration.steps]
    return [
        plan_expert_parallel(calibration, machines, count, ep, dispatch)
        for count in gpus
        for ep in ep_sizes(calibration.shape, count)
        for dispatch in known
    ]


def ep_sizes(shape: Shape, gpus: int) -> list[int]:
    """Over how many ranks the experts may lie: `EP_SIZES`, or all GPUs or experts where there are fewer."""
    return sorted({min(size, shape["E"], gpus) for size in EP_SIZES})


def sharded_plans(calibration: Calibration, machines: Machines, gpus: Sequence[int]) -> list[ShardedPlan]:
    """Of BF16 experts, and of FP8 experts with both gathers."""
    ways = ((False, False), (True, False), (True, True))
    return [
        plan_sharded(calibration, machines, count, in_fp8=in_fp8, gathered_in_fp8=gathered)
        for count in gpus
        for in_fp8, gathered in ways
    ]


def step_flops(shape: Shape) -> int:
    """Of forward and backward, of one GPU's tokens."""
    return FLOPS_A_MULTIPLY_ADD * GEMMS * PROJECTIONS * shape["T"] * shape["k"] * shape["H"] * shape["I"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plans for each shape in the JSON of a run, or how they compare with other runs; the exit code."""
    from fp8moe.bench.distributed.comparison import Comparison, compare
    from fp8moe.bench.distributed.scaling_tables import comparison_table, plan_tables
    from fp8moe.bench.tables import as_markdown, make_console

    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.against and arguments.experts:
        parser.error("--experts is for plans; with --against layers have the experts of the runs compared with")
    machines = Machines(
        arguments.per_node, arguments.network_gbit, arguments.network_share, arguments.peer_us, arguments.node_limit,
        arguments.relay,
    )  # fmt: skip
    source = arguments.file
    try:
        calibrations = Calibration.all_of(json.loads(source.read_text()))
        if arguments.only:
            kept = with_name(arguments.only, [calibration.shape for calibration in calibrations])
            calibrations = [calibration for calibration in calibrations if calibration.shape in kept]
        if arguments.experts:
            calibrations = [calibration.with_experts(arguments.experts) for calibration in calibrations]
        printed = [each for one in calibrations for each in plan_tables(one, machines, arguments.gpus)]
        if arguments.against:
            found: list[Comparison] = []
            for source in arguments.against:
                found += compare(calibrations, json.loads(source.read_text()), machines)
            printed = [comparison_table(found)]
    except (OSError, KeyError, ValueError) as error:
        print(f"fp8moe scaling: error: {source}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    console = make_console()
    for each in printed:
        text = as_markdown(each) if arguments.markdown and not isinstance(each, str) else each
        console.print("", text, sep="\n", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    assumed = Machines()
    parser = argparse.ArgumentParser(
        prog="python -m fp8moe.bench.distributed.scaling", description="Plan for more GPUs than were measured."
    )
    parser.add_argument("file", type=Path, help="distributed.json of `bench --distributed --output`")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="compare with these runs instead"
    )
    parser.add_argument(
        "--gpus", type=_numbers, default=list(GPUS), metavar="NUMBERS", help="how many, comma-separated (8,64,1024)"
    )
    parser.add_argument("--experts", type=int, help="of the layer (default: as many as were measured)")
    parser.add_argument("--per-node", type=int, default=assumed.per_node, help="GPUs that NVLink joins (8)")
    parser.add_argument("--network-gbit", type=float, default=assumed.network_gbit_s, help="Gb/s of a GPU (400)")
    parser.add_argument("--network-share", type=float, default=assumed.network_share, help="that is reached (0.85)")
    parser.add_argument("--peer-us", type=float, default=assumed.peer_us, help="of an exchange for one more peer (1)")
    parser.add_argument("--node-limit", type=int, help="nodes at most for the experts of a token (default: any)")
    parser.add_argument("--relay", action="store_true", help="a token crosses the network once to a node")
    parser.add_argument("--only", metavar="TEXT", help="of the shapes those with this text in their names")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers")
    return found


if __name__ == "__main__":
    sys.exit(main())
