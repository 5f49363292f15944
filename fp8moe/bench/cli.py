"""`python -m fp8moe bench`: the flags, and a run from them."""

import argparse
import gc
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fp8moe.bench import peers
from fp8moe.bench.ceilings import measure_ceilings
from fp8moe.bench.distributed.problem import BALANCES, KNOWN, check_shape, default_shapes
from fp8moe.bench.distributed.ranks import LAUNCH, check_launch, joined
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import Lab, measure_problem
from fp8moe.bench.model.measure import Workload
from fp8moe.bench.model.models import MODELS
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.record import Report, environment_of, write_json
from fp8moe.bench.shapes import Balance, Shape, layer_shape, parse_shape, with_name
from fp8moe.bench.task import Task
from fp8moe.bench.timing import LONG_FLUSHES, Budget, stopwatch_for
from fp8moe.bench.variants import backends_to_measure, preferences_to_measure
from fp8moe.config import TOKEN_TILES, FP8Config, KernelPreference
from fp8moe.distributed import TorchExchange
from fp8moe.gemm.explain import explain

OP_BUDGET, KERNEL_BUDGET = Budget(300.0), Budget(100.0)
"""Of a variant and of a kernel."""
TRAINING_STEPS, QUICK_TRAINING_STEPS = 20, 3
"""Of a whole model, for its losses."""
QUICK_OP_BUDGET, QUICK_KERNEL_BUDGET = Budget(60.0, repetitions=3, min_runs=2), Budget(20.0, repetitions=3)
"""With `--quick`."""
TOKEN_TILE_NAMES: dict[str, int | None] = {"default": None} | {str(tile): tile for tile in TOKEN_TILES}
"""What `--token-tile` may name."""
JSON_NAME, CHART_NAME = "bench.json", "bench.png"
SUCCESS, FAILURE, BAD_ARGUMENTS = 0, 1, 2

LAYERS, WIRE = PARTS = ("layers", "wire")
"""Of a distributed run."""
STEP_BUDGET, QUICK_STEP_BUDGET = Budget(3000.0, min_runs=2), Budget(1000.0, repetitions=3, min_runs=1)
"""Of training steps of a sharded model."""
_SHAPE_AND_ONLY = "--shape and --only are given; --only chooses among the default shapes: leave one out"

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench`."""
    parser.add_argument("--layer", action="store_true", help="measure the whole MoE layer instead of grouped_mm")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="measure the layer with its experts on several ranks, or with --model training steps under FSDP2, within "
        f"torchrun: {LAUNCH}",
    )
    parser.add_argument(
        "--parts",
        type=partial(_chosen, {part: part for part in PARTS}),
        default=list(PARTS),
        metavar="NAMES",
        help=f"what of --distributed is measured, comma-separated: {_listed(PARTS)} (default: both)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="M,N,K,E",
        help="rows, output features, contracted features, experts; with --layer T,k,H,I,E: tokens, experts that each "
        "chooses, features, features of an expert, experts; with --distributed likewise, tokens of a rank, experts of "
        "all; may be given again (default: models people train, on a CPU tiny ones)",
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="of the default shapes those with this text in their names, in upper or lower case, such as mixtral",
    )
    parser.add_argument(
        "--routing",
        type=partial(_chosen, {balance.value: balance for balance in Balance}),
        metavar="NAMES",
        help=f"how rows are spread over experts, comma-separated: {_listed(PRODUCT.balances)}; with --layer "
        f"{_listed(LAYER.balances)}, with --distributed {_listed(BALANCES)} (default: the first)",
    )
    parser.add_argument(
        "--backend",
        type=partial(_chosen, {preference.value: preference for preference in KernelPreference}),
        metavar="NAMES",
        help=f"kernel preferences of fp8moe, comma-separated: {_listed(KernelPreference)} (default: auto, and what "
        "else can be used and differs from it)",
    )
    parser.add_argument(
        "--token-tile",
        type=partial(_chosen, TOKEN_TILE_NAMES),
        default=[None],
        metavar="TOKENS",
        help=f"FP8Config.wgrad_token_tile, comma-separated: {_listed(TOKEN_TILE_NAMES)} (default: the "
        "library's, which is 256 where that is faster)",
    )
    parser.add_argument(
        "--kernels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure each kernel by itself (default: yes)",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="measure training steps of a whole Hugging Face model instead (needs transformers); takes --layers, "
        "--batch, --length, --steps, --compile, --quick and --output alone, and --distributed",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="measure quantized experts (fp8moe.int8) instead; takes --only with names of sections, such as "
        "dense,few, --quick and --output alone",
    )
    parser.add_argument("--layers", type=_positive, default=4, help="of --model (default: 4)")
    parser.add_argument("--batch", type=_positive, default=2, help="sequences of --model (default: 2)")
    parser.add_argument("--length", type=_positive, default=4096, help="tokens of each (default: 4096)")
    parser.add_argument(
        "--steps",
        type=_positive,
        help=f"training steps of --model (default: {TRAINING_STEPS}, with --quick {QUICK_TRAINING_STEPS})",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also with the layers of --model compiled (default: yes)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"write {JSON_NAME} and {CHART_NAME} there, with --model model.json and model.md, with --distributed "
        "distributed.json and distributed.png, or fsdp.json and fsdp.md",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repetitions, rougher figures")


def run(args: argparse.Namespace) -> int:
    """Measure on the current CUDA device, or on a CPU where there is none, print and write.

    Returns:
        The exit status: 1 if a part of fp8moe failed or computed something wrong, 2 for arguments that cannot be met.
    """
    if args.distributed:
        return _run_distributed(args)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if args.model:
        return _run_model(args, device)
    if args.int8:
        return _run_int8(args, device)
    task = LAYER if args.layer else PRODUCT
    balances: Sequence[Balance] = args.routing or task.balances[:1]
    try:
        check_extras("rich", *(["matplotlib"] if args.output else []))
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
        if args.shape and args.only:
            raise ValueError(_SHAPE_AND_ONLY)
        shapes = [task.parse(text) for text in args.shape or ()]
        shapes = shapes or list(task.shapes_on_cuda if device.type == "cuda" else task.shapes_on_cpu)
        shapes = with_name(args.only, shapes) if args.only else shapes
        for balance in balances:
            if balance not in task.balances:
                raise ValueError(f"--routing {balance.value!r} is not one of {_listed(task.balances)}")
        preferences = preferences_to_measure(device, args.backend)
    except (ValueError, OSError) as error:
        print(f"fp8moe bench: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    if device.type == "cpu":
        torch.set_num_threads(1)  # whose times other work there upsets least
    cases = [(shape, balance) for shape in shapes for balance in balances]
    return _measure(args, device, task, cases, preferences)


def _run_distributed(args: argparse.Namespace) -> int:
    """Every rank runs this; the first prints and writes."""
    try:
        check_extras("rich", *(["matplotlib"] if args.output and not args.model else []))
        check_launch()
        num_ranks, on_cuda = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
        if args.layer or args.backend:
            raise ValueError("--distributed has its own layers: leave out --layer and --backend")
        if args.model:
            check_extras("transformers", extra="hf")
            _check_that_model_is_alone(args)
        if args.shape and args.only:
            raise ValueError(_SHAPE_AND_ONLY)
        shapes = [parse_shape(text, KNOWN, layer_shape) for text in args.shape or ()]
        shapes = shapes or default_shapes(on_cuda, num_ranks)
        shapes = with_name(args.only, shapes) if args.only else shapes
        for shape in shapes:
            check_shape(shape, num_ranks)
        balances: Sequence[Balance] = args.routing or BALANCES[:1]
        for balance in balances:
            if balance not in BALANCES:
                raise ValueError(f"--routing {balance.value!r} is not one of {_listed(BALANCES)}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fp8moe bench: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    from fp8moe.bench.distributed.command import Run, run_layers, run_model  # needs rich
    from fp8moe.bench.distributed.measure import Site

    budgets = (QUICK_OP_BUDGET, QUICK_KERNEL_BUDGET) if args.quick else (OP_BUDGET, KERNEL_BUDGET)
    with joined() as ranks:
        run = Run(ranks, Site(ranks, TorchExchange(None), ranks.stopwatch(), *budgets), args.output)
        if args.model:
            right = run_model(run, _workload(args), QUICK_STEP_BUDGET if args.quick else STEP_BUDGET)
        else:
            cases = [(shape, balance) for shape in shapes for balance in balances]
            right = run_layers(run, cases, layers=LAYERS in args.parts, wire=WIRE in args.parts)
    return SUCCESS if right else FAILURE


def _run_model(args: argparse.Namespace, device: torch.device) -> int:
    try:
        check_extras("rich")
        check_extras("transformers", extra="hf")
        _check_that_model_is_alone(args)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"fp8moe bench: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    from fp8moe.bench.model.command import run_model  # needs rich

    run_model(_workload(args), device, args.compile, args.output)
    return SUCCESS


def _check_that_model_is_alone(args: argparse.Namespace) -> None:
    if args.layer or args.shape or args.only or args.routing or args.backend:
        raise ValueError("--model has its own shapes: leave out --layer, --shape, --only, --routing and --backend")


def _workload(args: argparse.Namespace) -> Workload:
    training_steps = args.steps or (QUICK_TRAINING_STEPS if args.quick else TRAINING_STEPS)
    return Workload(MODELS[args.model], args.layers, args.batch, args.length, training_steps)


def _run_int8(args: argparse.Namespace, device: torch.device) -> int:
    try:
        check_extras("rich", "triton")
        from fp8moe.bench.int8.command import run_int8  # needs both
        from fp8moe.bench.int8.sections import chosen

        if args.layer or args.shape or args.routing or args.backend:
            raise ValueError("--int8 has its own shapes: leave out --layer, --shape, --routing and --backend")
        sections = chosen(args.only)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"fp8moe bench: error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    run_int8(_lab(device, args.quick), device, sections, args.quick, args.output)
    return SUCCESS


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def check_extras(*modules: str, extra: str = "demo") -> None:
    """That what a command needs is installed; `extra` of the package brings it.

    Raises:
        ValueError: it is not.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"the module {module} is not installed; pip install 'fp8moe[{extra}]'")


def _measure(
    args: argparse.Namespace,
    device: torch.device,
    task: Task,
    cases: Sequence[tuple[Shape, Balance]],
    preferences: Sequence[KernelPreference],
) -> int:
    from fp8moe.bench import tables  # needs rich

    console = tables.make_console()
    lab = _lab(device, args.quick)
    report = Report(
        what=task.name,
        command=shlex.join(["python", "-m", "fp8moe", *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment_of(device),
        ceilings=lab.ceilings,
        problems=[],
    )
    console.print(tables.heading(report))
    if device.type == "cpu":
        console.print("These are times of one thread of a CPU: they say nothing about a GPU.")
    if not peers.is_installed(task.peer_package):
        console.print(f"{task.peer_package} is not installed, so it has no row here: pip install {task.peer_package}")

    plain = [FP8Config(kernel_preference=preference) for preference in preferences]
    configs = [replace(config, wgrad_token_tile=token_tile) for config in plain for token_tile in args.token_tile]
    kernel_backends = backends_to_measure(device, preferences) if args.kernels else None
    for shape, balance in cases:
        sizes: dict[str, Any] = {task.explained_as: shape.sizes}
        explains = [partial(explain, device, config, **sizes) for config in configs]
        for name in dict.fromkeys(each().config.kernel_preference.value for each in explains if not each().selected):
            console.print(f"fp8moe {name} cannot run {shape.title}, so it has no row there")
        with console.status(f"measuring {shape.title}, {balance.value} routing"):
            result = measure_problem(task, shape, balance, device, explains, kernel_backends, lab)
        report.problems.append(result)
        console.print("", tables.variant_table(result), *tables.notes(result), sep="\n")
        if result.kernels:
            console.print("", tables.kernel_table(result), sep="\n")
        _give_back_memory(device)
        if args.output:
            write_json(report, args.output / JSON_NAME)  # now: a run that is cut short keeps what it has
    if args.output:
        from fp8moe.bench.chart import draw  # needs matplotlib

        draw(args.output / JSON_NAME, args.output / CHART_NAME)
        console.print(f"written to {args.output}: {JSON_NAME}, {CHART_NAME}")
    failed = any(failure.is_ours for problem in report.problems for failure in problem.failures)
    return FAILURE if failed else SUCCESS


def _give_back_memory(device: torch.device) -> None:
    """Before the next problem, whose tensors have other sizes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _lab(device: torch.device, quick: bool) -> Lab:
    """Measure the ceilings of `device`."""
    stopwatch = stopwatch_for(device)
    return Lab(
        stopwatch,
        kernel_stopwatch=stopwatch_for(device, LONG_FLUSHES),
        op_budget=QUICK_OP_BUDGET if quick else OP_BUDGET,
        kernel_budget=QUICK_KERNEL_BUDGET if quick else KERNEL_BUDGET,
        ceilings=measure_ceilings(device, stopwatch),
    )


def _chosen(choices: dict[Any, T], text: str) -> list[T]:
    """What the names in `text`, separated by commas, stand for, each once."""
    names = dict.fromkeys(text.split(","))
    for name in names:
        if name not in choices:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {_listed(choices)}")
    return [choices[name] for name in names]


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item.value if isinstance(item, Enum) else item) for item in items)
