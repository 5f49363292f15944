"""The plans as tables."""

from collections.abc import Sequence

from rich.table import Table

from fp8moe.bench.distributed.calibration import Calibration
from fp8moe.bench.distributed.comparison import Comparison
from fp8moe.bench.distributed.scaling import (
    ExpertParallelPlan,
    Machines,
    ShardedPlan,
    expert_parallel_plans,
    sharded_plans,
    step_flops,
)
from fp8moe.bench.tables import new_table
from fp8moe.distributed import Dispatch

NAMES = {None: "plain BF16", Dispatch.BF16: "BF16 dispatch", Dispatch.FP8: "FP8 dispatch"}


def plan_tables(calibration: Calibration, machines: Machines, gpus: Sequence[int]) -> list[str | Table]:
    """All that is predicted with one shape's rates, and what from."""
    return [
        basis(calibration, machines),
        expert_parallel_table(calibration, expert_parallel_plans(calibration, machines, gpus)),
        sharded_table(calibration, sharded_plans(calibration, machines, gpus)),
    ]


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


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Each way to compute each layer of other runs: predicted and measured."""
    table = new_table("forward and backward, predicted and measured, ms")
    for column in ("layer (T, k, H, I, E)", "dispatch"):
        table.add_column(column, no_wrap=True)
    for column in (
        "ranks", "ranks\na token", "local\npredicted", "local\nmeasured", "wire\npredicted", "wire\nmeasured",
        "step\npredicted", "step\nmeasured", "error",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for each in comparisons:
        plan, measured = each.plan, each.measured
        table.add_row(
            f"({', '.join(map(str, each.shape.sizes))})", NAMES[plan.dispatch], str(plan.ep), f"{plan.visited:.2f}",
            f"{plan.local_ms:.2f}", f"{measured.local_ms:.2f}",
            f"{plan.wire_ms:.2f}", "-" if measured.wire_ms is None else f"{measured.wire_ms:.2f}",
            f"{plan.step_ms:.2f}", f"{measured.both_ms:.2f}", f"{each.error:+.1%}",
        )  # fmt: skip
    return table


def basis(calibration: Calibration, machines: Machines) -> str:
    """What the predictions for one shape are made from."""
    rows, gather = calibration.rows, calibration.gather_gb_s
    return (
        f"{calibration.shape.title}. Measured: {calibration.steps[Dispatch.FP8].local_ms:.2f} ms for forward and "
        f"backward without the wire with {calibration.measured_experts} experts a rank; an exchange takes "
        f"{rows.fixed_ms * 1e3:.0f} us and its bytes at {rows.gb_s:.0f} GB/s; gathers at {gather[True]:.0f} GB/s in "
        f"FP8 and {gather[False]:.0f} in BF16. "
        f"Assumed: nodes of {machines.per_node}, {machines.network_gb_s:.1f} GB/s a GPU between them, "
        f"{machines.peer_us:g} us for one more peer."
    )
