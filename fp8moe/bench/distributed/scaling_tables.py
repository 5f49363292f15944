"""The plans as tables."""

from collections.abc import Sequence

from rich.table import Table

from fp8moe.bench.distributed.calibration import Calibration
from fp8moe.bench.distributed.scaling import ExpertParallelPlan, Machines, ShardedPlan, step_flops
from fp8moe.bench.tables import new_table
from fp8moe.distributed import Dispatch

NAMES = {None: "plain BF16", Dispatch.BF16: "BF16 dispatch", Dispatch.FP8: "FP8 dispatch"}


def expert_parallel_table(calibration: Calibration, plans: Sequence[ExpertParallelPlan]) -> Table:
    """Predicted steps of one layer with its experts spread over ranks."""
    table = new_table(f"{calibration.shape.title}: expert parallelism, predicted")
    for column in ("GPUs", "ranks of\nexperts", "layer"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for column in (
        "rows an\nexpert", "ranks\na token", "nodes\na token", "NVLink\nMB", "network\nMB", "local\nms",
        "wire\nms", "waiting\nms", "step\nms", "bound\nms",
        "gradients\nms a step", "tokens/s\na GPU", "TFLOP/s\na GPU",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    flops = step_flops(calibration.shape)
    for plan in plans:
        table.add_row(
            str(plan.gpus), str(plan.ep), NAMES[plan.dispatch], f"{plan.rows_an_expert:,.0f}",
            f"{plan.visited:.2f}", f"{plan.visited_nodes:.2f}",
            f"{plan.near_bytes / 1e6:,.0f}", f"{plan.far_bytes / 1e6:,.0f}",
            f"{max(plan.local_ms, plan.host_ms):.1f}{'*' if plan.host_ms > plan.local_ms else ''}",
            f"{plan.wire_ms:.1f}", f"{plan.waiting_ms:.1f}", f"{plan.step_ms:.1f}", f"{plan.bound_ms:.1f}",
            f"{plan.gradient_ms:.1f}", f"{plan.tokens_per_second:,.0f}", f"{flops / plan.step_ms / 1e9:,.0f}",
        )  # fmt: skip
    return table


def sharded_table(calibration: Calibration, plans: Sequence[ShardedPlan]) -> Table:
    """Predicted steps of one layer whose weights are sharded over all GPUs."""
    table = new_table(f"{calibration.shape.title}: FSDP2 over all GPUs, predicted")
    table.add_column("GPUs", justify="right")
    table.add_column("layer", no_wrap=True)
    for column in (
        "gathered\nMB", "a gather\nms", "reduction\nms", "computing\nms", "in turns\nms", "bound\nms",
        "tokens a GPU\nthat hide it", "TFLOP/s\na GPU",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    flops = step_flops(calibration.shape)
    for plan in plans:
        table.add_row(
            str(plan.gpus), plan.name, f"{plan.gather_bytes / 1e6:,.0f}", f"{plan.gather_ms:.1f}",
            f"{plan.reduce_ms:.1f}", f"{plan.compute_ms:.1f}", f"{plan.step_ms:.1f}", f"{plan.bound_ms:.1f}",
            f"{plan.tokens_to_hide:,.0f}", f"{flops / plan.bound_ms / 1e9:,.0f}",
        )  # fmt: skip
    return table


def basis(calibration: Calibration, machines: Machines) -> str:
    """What the predictions for one shape are made from."""
    rows, gather = calibration.rows_gb_s, calibration.gather_gb_s
    return (
        f"{calibration.shape.title}. Measured: {calibration.without_wire_ms[Dispatch.FP8]:.2f} ms for forward and "
        f"backward without the wire with {calibration.measured_experts} experts a rank; messages at {rows[True]:.0f} "
        f"GB/s in FP8 and {rows[False]:.0f} in BF16, gathers at {gather[True]:.0f} and {gather[False]:.0f}. "
        f"Assumed: nodes of {machines.per_node}, {machines.network_gb_s:.1f} GB/s a GPU between them, "
        f"{machines.peer_us:g} us a peer."
    )
