"""Compile for sm_90 every kernel the package launches, with no GPU: `python -m tests.kernels.compile_for_hopper`.

With `I/N` the I-th of N shares, for N processes to divide the work.

Runs each launcher on CPU tensors with the launch replaced by a compilation, so that what is compiled (types, constants,
warps, alignment) is exactly what would be launched. Prints one JSON object a kernel variant.

A program of its own, because Triton cannot both interpret and compile in one process.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fp8moe
from fp8moe.config import TOKEN_TILES
from fp8moe.gate import SWIGLU, Gate, GatedActivation
from fp8moe.kernels.activations import launch_quantize_activation
from fp8moe.kernels.block_sums import launch_block_sums
from fp8moe.kernels.combine import launch_combine
from fp8moe.kernels.fingerprint import launch_find_changes
from fp8moe.kernels.gated_in_bf16 import launch_gated, launch_gated_backward
from fp8moe.kernels.groups import launch_ends_within, launch_plan_groups
from fp8moe.kernels.int8.platform import HOPPER
from fp8moe.kernels.messages import PackedChoices, launch_pack
from fp8moe.kernels.not_finite import launch_note_not_finite
from fp8moe.kernels.part_sums import launch_part_sums
from fp8moe.kernels.ranks import launch_choice_places, launch_choose_ranks, launch_slots_within
from fp8moe.kernels.routing import FEW, launch_route, launch_route_choices
from fp8moe.kernels.sample_sums import launch_sample_sums
from fp8moe.kernels.sm90.activations import launch_quantize_activation_hopper
from fp8moe.kernels.sm90.long_tiles import launch_quantize_long_tiles_hopper
from fp8moe.kernels.sm90.m_grouped import launch_m_grouped
from fp8moe.kernels.sm90.scale_steps import launch_scale_steps
from fp8moe.kernels.sm90.swiglu_backward import has_twin, launch_quantize_swiglu_backward_hopper
from fp8moe.kernels.sm90.wgrad import launch_wgrad
from fp8moe.kernels.spread import launch_spread
from fp8moe.kernels.spread_rows import launch_spread_rows
from fp8moe.kernels.swiglu_backward import launch_quantize_swiglu_backward
from fp8moe.kernels.swiglu_forward import launch_quantize_swiglu
from fp8moe.kernels.swiglu_quantize import launch_quantize_swiglu_rows
from fp8moe.kernels.transpose_codes import launch_transpose_codes
from fp8moe.kernels.unpad import launch_unpad
from fp8moe.kernels.unused_rows import launch_zero_unused_rows
from fp8moe.kernels.weights import launch_quantize_weight
from fp8moe.operands import LongTiles, RowOperand, TokenGroups, TokenLayout, TokenOperand, in_whole_blocks
from fp8moe.quantize.fingerprint import SECTOR, SECTORS
from fp8moe.quantize.messages import MessageLayout, Messages
from fp8moe.rows.groups import MAX_GROUPS_IN_KERNEL, plan_by_bucketize, plan_groups
from fp8moe.rows.routing import Routing
from tests.generators import FLOAT_DTYPES, offsets
from tests.kernels.int8_launches import int8_launches

TARGET = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")

KINDS = [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, False)]
"""Dtype of the input, and whether scales are powers of two: neither changes what the other compiles to, so both are
varied for one dtype alone."""


GPT_OSS = Gate.clamped_swiglu(7.0, alpha=1.702, up_offset=1.0)
ACTIVATIONS = [
    GatedActivation(256, SWIGLU, torch.empty(3, 512, dtype=torch.bfloat16)),
    GatedActivation(200, SWIGLU),
    GatedActivation(256, GPT_OSS, torch.empty(3, 512, dtype=torch.bfloat16), interleaved=True),
    GatedActivation(200, GPT_OSS, torch.empty(3, 400, dtype=torch.bfloat16), interleaved=True),
    GatedActivation(256, Gate.clamped_swiglu(10.0)),
    GatedActivation(256, Gate.post_clamped_swiglu(7.0)),
    GatedActivation(256, Gate.geglu_tanh()),
    GatedActivation(256, Gate.relu_squared()),
    GatedActivation(200, Gate.relu_squared(), torch.empty(3, 200)),
]
"""What experts compute besides plain SwiGLU of whole blocks."""


class OfflineDriver:
    """What Triton asks of a driver before it launches; there is no device behind it."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes (a spill is either) per thread, as the assembler assigned them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    if set(found) != {"reg", "stack", "local"}:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return found


def kernels_of_package() -> set[str]:
    """Every `*_kernel` in fp8moe: what must be compiled here."""
    names = set()
    for info in pkgutil.walk_packages(fp8moe.__path__, "fp8moe."):
        if not info.name.startswith(
            ("fp8moe.__main__", "fp8moe.demo", "fp8moe.bench", "fp8moe.integrations", "fp8moe.distributed")
        ):  # no kernels there
            module = importlib.import_module(info.name)
            names |= {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {name for name in names if name.endswith("_kernel")}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a launch for each variant of each kernel."""
    groups = plan_groups(offsets([100, 0, 200]), 300)
    rows = RowOperand.empty(groups.capacity, 256, CPU)
    for layout in TokenLayout:
        tokens = TokenOperand.empty(groups.capacity, 256, layout, CPU)
        made: dict[str, tuple[RowOperand | None, TokenOperand | None]]
        made = {"rows": (rows, None), "tokens": (None, tokens), "both": (rows, tokens)}
        for (dtype, pow2), (name, operands) in product(KINDS, made.items()):
            x = torch.empty(300, 256, dtype=dtype)
            variant = f"activation, {dtype}, {name}, {layout.value}, pow2={pow2}"
            yield variant, partial(launch_quantize_activation, x, groups, *operands, pow2=pow2)
            row_operand, token_operand = operands
            if token_operand:
                launch = partial(launch_quantize_activation_hopper, x, groups, row_operand, token_operand, pow2=pow2)
                yield f"{variant}, Gluon", launch
            if token_operand and dtype != torch.float16:
                long = TokenOperand.of(token_operand.tensors, layout, token_tile=512 if pow2 else 256)
                launch = partial(launch_quantize_long_tiles_hopper, x, groups, row_operand, long, pow2=pow2)
                yield f"{variant}, tiles of {long.token_tile}", launch
    sizes = [(200, TokenLayout.PER_EXPERT), (200, TokenLayout.SIDE_BY_SIDE), (2880, TokenLayout.SIDE_BY_SIDE)]
    for (features, layout), dtype in product(sizes, (torch.bfloat16, torch.float32)):
        x, both = torch.empty(300, features, dtype=dtype), RowOperand.empty(groups.capacity, features, CPU)
        tokens = TokenOperand.empty(groups.capacity, features, layout, CPU)
        long = TokenOperand.of(tokens.tensors, layout, token_tile=256)
        variant = f"activation of {features} features, {dtype}, {layout.value}"
        yield variant, partial(launch_quantize_activation, x, groups, both, tokens, pow2=False)
        yield f"{variant}, Gluon", partial(launch_quantize_activation_hopper, x, groups, both, tokens, pow2=False)
        launch = partial(launch_quantize_long_tiles_hopper, x, groups, both, long, pow2=False)
        yield f"{variant}, tiles of 256", launch
    strided = torch.empty(256, 300, dtype=torch.bfloat16).t()
    yield "activation, transposed", partial(launch_quantize_activation, strided, groups, rows, None, pow2=False)
    for (features, choices), (dtype, pow2) in product(((256, 1), (256, 8), (256, 64), (2880, 4), (200, 2)), KINDS):
        operand = RowOperand.empty(groups.capacity, features, CPU)
        choice_row = torch.zeros(30, choices, dtype=torch.int32)
        for x in (torch.empty(30, features, dtype=dtype), torch.empty(features, 30, dtype=dtype).t()):
            if x.is_contiguous() or choices == 2:
                variant = f"rows of tokens, {choices} choices, {features} by {x.stride()}, {dtype}, pow2={pow2}"
                yield variant, partial(launch_spread_rows, x, choice_row, groups, operand, pow2=pow2)

    yield from gated_launches(groups)
    yield from gated_hopper_launches(groups)
    for act in ACTIVATIONS:
        yield from other_gated_launches(groups, act)
    yield (
        "sums of blocks",
        partial(launch_block_sums, torch.empty(groups.capacity // 128, 272), groups, torch.empty(3, 272)),
    )

    data, scale = torch.empty(2, 256, 128, dtype=torch.float8_e4m3fn), torch.empty(2, 2, 1)
    weights: dict[str, dict[str, Any]]
    weights = {
        "forward": {"forward_data": data, "dgrad_data": None},
        "dgrad": {"forward_data": None, "dgrad_data": data},
        "both": {"forward_data": data, "dgrad_data": data},
    }
    for (dtype, pow2), (name, outputs) in product(KINDS, weights.items()):
        w = torch.empty(2, 256, 128, dtype=dtype)
        variant = f"weight, {dtype}, {name}, pow2={pow2}"
        yield variant, partial(launch_quantize_weight, w, **outputs, scale=scale, pow2=pow2)
    codes, scales = torch.empty(2, 2944, 256, dtype=torch.float8_e4m3fn), torch.empty(2, 23, 2)
    for k, stored in product((136, 129), ("E,N,K", "E,K,N")):
        w = torch.empty(2, 2880, k, dtype=torch.bfloat16)
        w = w if stored == "E,N,K" else torch.empty(2, k, 2880, dtype=torch.bfloat16).transpose(1, 2)
        launch = partial(launch_quantize_weight, w, codes, codes.transpose(1, 2).contiguous(), scales, pow2=False)
        yield f"weight, {tuple(w.shape)} stored {stored}", launch
    yield "transpose codes", partial(launch_transpose_codes, codes, codes.transpose(1, 2).contiguous())
    number, known, changed = (torch.empty(shape, dtype=torch.int32) for shape in ((1,), (3, 2), (3,)))
    for dtype, pow2 in KINDS:
        w = torch.empty(2, 256, 128, dtype=dtype)
        if_changed = partial(launch_quantize_weight, changed=changed, multiprocessors=132)
        variant = f"weight if it has changed, {dtype}, pow2={pow2}"
        yield variant, partial(if_changed, w, **weights["both"], scale=scale, pow2=pow2)
    yield from pair_launches(changed)
    for dtype, force in product((torch.int16, torch.int32), (False, True)):
        bits = torch.empty(2, 256, 130 if force else 128, dtype=dtype)
        find = partial(launch_find_changes, bits, number, known, changed, force=force, sectors=SECTORS, sector=SECTOR)
        yield f"changes, {dtype}, {force}", find

    for dtype in FLOAT_DTYPES:
        out = torch.empty(300, 256, dtype=dtype)
        yield f"unused rows, {dtype}", partial(launch_zero_unused_rows, out, groups.ends)
        padded = torch.empty(groups.capacity, 256, dtype=torch.bfloat16)
        yield f"unpad, {dtype}", partial(launch_unpad, padded, groups.token_row, out)

    for num_experts in (1, 8, 256, MAX_GROUPS_IN_KERNEL):
        offs = torch.zeros(num_experts, dtype=torch.int32)
        yield f"ends, {num_experts} experts", partial(launch_ends_within, offs, 300, offs.clone())
        yield f"plan, {num_experts} experts", partial(launch_plan_groups, offs, 300, plan_by_bucketize(offs, 300))
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64) if num_experts == 8 else (torch.int64,):
            for num_tokens in (300, FEW):
                topk_ids = torch.zeros(num_tokens, 8, dtype=dtype)
                topk_weights = None if num_experts == 1 else torch.zeros(num_tokens, 8)
                routing = Routing.from_topk(topk_ids, num_experts, topk_weights).tensors
                variant = f"route, {dtype}, {num_experts} experts, {num_tokens} tokens"
                yield variant, partial(launch_route, topk_ids, topk_weights, num_experts, routing)
                maps = routing[0], routing[6]
                yield f"{variant}, no padding", partial(launch_route_choices, topk_ids, num_experts, *maps)
                in_messages = torch.zeros(num_tokens, 16, dtype=dtype)[:, :8]
                launch = partial(launch_route, in_messages, topk_weights, num_experts, routing)
                yield f"{variant}, in messages", launch

    parts, choice_row = torch.empty(6, 300), torch.zeros(300, dtype=torch.int32)
    for choices in (1, 8):
        sums = torch.empty(300, choices + 8)[:, :choices]
        launch = partial(launch_part_sums, parts, choice_row.repeat(choices).view(300, choices), None, sums)
        yield f"part sums, {choices} choices", launch
    yield "part sums, rows", partial(launch_part_sums, parts, None, choice_row[:8], parts[0])

    for dtype, choices, num_columns in product(FLOAT_DTYPES, (1, 8, 64), (100, 7168)):
        outputs_of_experts = torch.empty(300, num_columns, dtype=dtype)
        choice_row = torch.zeros(30, choices, dtype=torch.int32)
        for out_dtype in dict.fromkeys((dtype, torch.float32)):
            out = torch.empty(30, num_columns, dtype=out_dtype)
            variant = f"combine, {choices} choices, {num_columns} columns, {dtype} to {out_dtype}"
            yield variant, partial(launch_combine, outputs_of_experts, choice_row, out)
            yield variant.replace("combine", "spread"), partial(launch_spread, out, choice_row, outputs_of_experts)

    yield from monitor_launches()
    yield from int8_launches(HOPPER)
    yield from message_launches(groups)
    yield from gated_in_bf16_launches()
    yield from hopper_launches(groups)


def monitor_launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """What watches: of results, with and without the input; of samples, gathered, whole, and of weights."""
    first, now = torch.zeros(2, dtype=torch.int64), 2**32 + 1
    for dtype, num_columns, every in product(FLOAT_DTYPES, (200, 2048), (128, 1)):
        x, out = torch.empty(300, num_columns, dtype=dtype), torch.empty(num_columns, 300, dtype=dtype).t()
        variant = f"not finite, {num_columns} columns of {every}, {dtype}"
        yield variant, partial(launch_note_not_finite, x, every, None, 1, first[1:], now)
        yield f"{variant}, two", partial(launch_note_not_finite, x, 1, x, every, first, now)
        yield f"{variant}, two, transposed", partial(launch_note_not_finite, x.float(), every, out, 1, first, now)
    sums, source = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(512, dtype=torch.int64)
    for dtype, pow2 in KINDS:
        x, w = torch.empty(600, 200, dtype=dtype), torch.empty(3, 256, 200, dtype=dtype)
        kinds: tuple[tuple[str, Tensor | None, Tensor | None], ...]
        kinds = ("rows", sums[0], None), ("tokens", None, sums[0]), ("both", sums[0], sums[1])
        for name, by_row, by_token in kinds:
            variant = f"sample, {dtype}, {name}, pow2={pow2}"
            yield variant, partial(launch_sample_sums, x, None, (0, 1), by_row, by_token, None, pow2=pow2)
            yield f"{variant}, gathered", partial(launch_sample_sums, x, source, (), by_row, by_token, None, pow2=pow2)
        variant = f"sample of a weight, {dtype}, pow2={pow2}"
        yield variant, partial(launch_sample_sums, w, None, (0, 1, 2, 3), None, None, sums[2], pow2=pow2)
        stored = w.transpose(1, 2).contiguous().transpose(1, 2)
        yield f"{variant}, transposed", partial(launch_sample_sums, stored, None, (5,), None, None, sums[2], pow2=pow2)


def message_launches(groups: TokenGroups) -> Iterator[tuple[str, Callable[[], None]]]:
    """What packs tokens of each dtype, and makes operands of what arrives: rows, and tokens by each kernel."""
    for num_features, choices in ((256, 8), (200, 2)):
        in_fp8, in_bf16 = (
            Messages(torch.empty(300, layout.num_bytes, dtype=torch.uint8), layout)
            for layout in (MessageLayout(num_features, choices, is_fp8) for is_fp8 in (True, False))
        )
        slots = torch.zeros(300, choices, dtype=torch.int32)
        for dtype in FLOAT_DTYPES:
            x = torch.empty(300, num_features, dtype=dtype)
            yield f"pack {num_features}, {dtype}, FP8", partial(launch_pack, x, slots, in_fp8.codes, in_fp8.scale)
            yield f"pack {num_features}, {dtype}, BF16", partial(launch_pack, x, slots, in_bf16.values, None)
        for dtype, weights_dtype in ((torch.int64, torch.float32), (torch.int32, torch.bfloat16)):
            ids, weights = torch.empty(300, choices, dtype=dtype), torch.empty(300, choices, dtype=weights_dtype)
            x, packed = torch.empty(300, num_features, dtype=torch.bfloat16), (in_fp8.ids, in_fp8.weights, 16)
            both = PackedChoices(ids, weights, *packed)
            variant = f"pack {num_features} and {choices} choices, {dtype}, {weights_dtype}"
            yield f"{variant}, FP8", partial(launch_pack, x, slots, in_fp8.codes, in_fp8.scale, both)
            yield f"{variant}, BF16", partial(launch_pack, x, slots, in_bf16.values, None, both)
        rows = RowOperand.empty(groups.capacity, num_features, CPU)
        codes, scale = in_fp8.codes, in_fp8.scale
        launch = partial(launch_spread_rows, codes, slots, groups, rows, pow2=True, x_scale=scale)
        yield f"rows of messages of {num_features}, {choices} choices", launch
        for layout in TokenLayout:
            tokens = TokenOperand.empty(groups.capacity, num_features, layout, CPU)
            long = TokenOperand.of(tokens.tensors, layout, token_tile=256)
            x, variant = codes[:, :num_features], f"tokens of messages of {num_features}, {layout.value}"
            for name, requantize, operand in (
                ("Triton", launch_quantize_activation, tokens), ("Gluon", launch_quantize_activation_hopper, tokens),
                ("tiles of 256", launch_quantize_long_tiles_hopper, long),
            ):  # fmt: skip
                launch = partial(requantize, x, groups, None, operand, pow2=True, x_scale=scale)
                yield f"{variant}, {name}", launch
    for dtype in (torch.int64, torch.int32):
        for choices in (1, 3, 8):
            ids, slots = torch.empty(300, choices, dtype=dtype), torch.empty(300, choices, dtype=torch.int32)
            ends, counted = torch.zeros(4, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
            sent, variant = torch.zeros(4, 3, dtype=torch.int64), f"of {choices} choices, {dtype}"
            yield f"ranks {variant}", partial(launch_choose_ranks, ids, 4, 16, 2**40, slots, sent)
            yield f"places {variant}", partial(launch_choice_places, ids, slots, 4, 16, slots, None)
            yield f"places {variant}, counted", partial(launch_choice_places, ids, slots, 4, 16, slots, counted)
    yield "slots within a capacity", partial(launch_slots_within, slots, slots, ends, 64, slots)


def gated_in_bf16_launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Each gate, once of choices with weights and once of rows without, in features that do and do not fill tiles."""
    choice_row = torch.zeros(300, dtype=torch.int32)
    gates = [SWIGLU, *dict.fromkeys(act.gate for act in ACTIVATIONS)]
    cases = product(gates, (torch.bfloat16, torch.float32), ((100, 1), (2048, 1), (2048, 2)), (False, True))
    for gate, dtype, (features, step), routed in cases:
        if step == 2 and not gate.has_gate:
            continue
        parts, d_parts = ([torch.empty(300, gate.projections * features, dtype=dtype)] for _ in range(2))
        weights, row = (torch.empty(300), choice_row) if routed else (None, None)
        act = torch.empty(300, features, dtype=torch.bfloat16)
        variant = f"{gate.code}, {dtype}, {features} features by {step}, routed={routed}"
        how = gate.code, step == 2
        yield f"BF16 activation, {variant}", partial(launch_gated, parts, weights, row, act, *how)
        yield (
            f"BF16 activation, backward, {variant}",
            partial(launch_gated_backward, act, parts, weights, row, d_parts, weights, *how),
        )


def pair_launches(changed: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Weights whose rows lie side by side as pairs: of whole blocks, and as gpt-oss has them. 16-bit ones fill the
    registers that they may have."""
    for (dtype, pow2), half in product(KINDS, (256, 2880)):
        padded = in_whole_blocks(half)
        w = torch.empty(2, half, 2 * half, dtype=dtype).transpose(1, 2)
        forward, dgrad = (
            torch.empty(2, *sizes, dtype=torch.float8_e4m3fn) for sizes in ((2 * padded, padded), (padded, 2 * padded))
        )
        scale = torch.empty(2, 2 * padded // 128, padded // 128)
        launch = partial(launch_quantize_weight, w, scale=scale, pow2=pow2, pairs=True)
        variant = f"pairs of a weight, {dtype}, {half}, pow2={pow2}"
        yield f"{variant}, forward", partial(launch, forward_data=forward, dgrad_data=None)
        yield f"{variant}, dgrad", partial(launch, forward_data=None, dgrad_data=dgrad)
        both = partial(launch, forward_data=forward, dgrad_data=dgrad)
        yield f"{variant}, both", both
        yield f"{variant}, both if it has changed", partial(both, changed=changed, multiprocessors=132)


def hopper_launches(groups: TokenGroups) -> Iterator[tuple[str, Callable[[], object]]]:
    """The grouped GEMMs: both kernels in each output dtype, wgrad also where it adds to its output, for each tile; for
    sizes of whole blocks, for one that TMA can write and pieces divide, and for others."""
    yield from hopper_launches_of_size(groups, 384, 256, FLOAT_DTYPES)
    for n, k in ((2880, 2880), (200, 136), (127, 129)):
        yield from hopper_launches_of_size(groups, n, k, (torch.bfloat16, torch.float32))


def hopper_launches_of_size(
    groups: TokenGroups, n: int, k: int, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of a weight `(E, N, K)`, to outputs of these dtypes."""
    rows, whole = RowOperand.empty(groups.capacity, k, CPU), (in_whole_blocks(n), in_whole_blocks(k))
    weight = torch.empty(3, *whole, dtype=torch.float8_e4m3fn)
    lhs, rhs = (TokenOperand.empty(groups.capacity, size, TokenLayout.SIDE_BY_SIDE, CPU) for size in (n, k))
    yield f"scale steps, {k}", partial(launch_scale_steps, rhs.stored_scale, groups.padded_ends)
    for dtype in dtypes:
        yield (
            f"M-grouped, {n} x {k}, {dtype}",
            partial(
                launch_m_grouped, *rows.tensors, weight, torch.empty(3, whole[0] // 128, whole[1] // 128),
                groups.row_expert, groups.row_source, groups.ends, groups.padded_ends,
                torch.empty(300, n, dtype=dtype), multiprocessors=132,
            ),
        )  # fmt: skip
    outputs = [(dtype, False, TOKEN_TILES[0]) for dtype in dtypes] + [(torch.float32, True, TOKEN_TILES[0])]
    for token_tile in TOKEN_TILES[1:]:
        outputs += [(torch.bfloat16, False, token_tile), (torch.float32, False, token_tile)]
        outputs += [(torch.float32, True, token_tile)]
    for dtype, accumulate, token_tile in outputs:
        out = torch.empty(3, n, k, dtype=dtype)
        yield (
            f"wgrad, {n} x {k}, {dtype}, accumulate={accumulate}, tiles of {token_tile}",
            partial(
                launch_wgrad, lhs.data, rhs.data, lhs.stored_scale, rhs.stored_scale, groups.padded_ends, out,
                accumulate=accumulate, multiprocessors=132, rhs_token_tile=token_tile,
            ),
        )  # fmt: skip


def gated_launches(groups: TokenGroups) -> Iterator[tuple[str, Callable[[], None]]]:
    """`launches` of the kernels that make an activation: they compile slowly, so unrelated options vary together."""
    features = 256
    rows = RowOperand.empty(groups.capacity, features, CPU)
    wide_rows = RowOperand.empty(groups.capacity, 2 * features, CPU)
    sums = torch.empty(features // 128, 300)
    tile_amax = torch.empty(groups.capacity // 128, features)
    inputs = [(*kind, TokenLayout.PER_EXPERT) for kind in KINDS]
    inputs += [(torch.bfloat16, pow2, TokenLayout.SIDE_BY_SIDE) for pow2 in (False, True)]
    for dtype, pow2, layout in inputs:
        tokens = TokenOperand.empty(groups.capacity, features, layout, CPU)
        wide_tokens = TokenOperand.empty(groups.capacity, 2 * features, layout, CPU)
        x, d_act = torch.empty(300, 2 * features, dtype=dtype), torch.empty(300, features, dtype=dtype)
        options: dict[str, Any] = {
            "row_weights": None if pow2 else torch.empty(300),
            "pow2": pow2,
            "act": GatedActivation(features, SWIGLU),
        }
        variant = f"{dtype}, {layout.value}, pow2={pow2}"
        forward: dict[str, tuple[Any, ...]] = {
            "rows": (rows, None),
            "rows and maxima": (rows, None, {"measured": LongTiles(256, tile_amax)}),
            "rows and codes of x": (rows, None, {"x_rows": wide_rows}),
            "rows, codes of x and maxima": (rows, None, {"x_rows": wide_rows, "measured": LongTiles(512, tile_amax)}),
            "tokens": (None, tokens),
            "long tokens": (None, tokens, {"tile_amax": tile_amax}),
            "both": (rows, tokens),
            "both, long": (rows, tokens, {"tile_amax": tile_amax}),
        }
        for name, (row_operand, token_operand, *amax) in forward.items():
            launch = partial(launch_quantize_swiglu, x, groups, row_operand, token_operand, **options)
            yield f"SwiGLU, {name}, {variant}", partial(launch, **dict(*amax))
        backward: dict[str, tuple[Any, ...]] = {
            "all": (wide_rows, wide_tokens, tokens, sums, None),
            "all, long": (wide_rows, wide_tokens, tokens, sums, tile_amax),
            "frozen weights": (wide_rows, None, None, sums, None),
            "frozen input": (None, wide_tokens, tokens, sums, None),
            "frozen input, long": (None, wide_tokens, tokens, sums, tile_amax),
            "activation alone": (None, None, tokens, None, None),
            "activation alone, long": (None, None, tokens, None, tile_amax),
        }
        for name, (*operands, act_amax) in backward.items():
            launch = partial(launch_quantize_swiglu_backward, d_act, x, groups, *[*operands, None], **options)
            yield f"SwiGLU backward, {name}, {variant}", partial(launch, act_amax=act_amax)
            if dtype == torch.bfloat16 and layout is TokenLayout.SIDE_BY_SIDE:
                launch = partial(
                    launch_quantize_swiglu_backward, d_act, wide_rows, groups, *[*operands, None], **options
                )
                yield f"SwiGLU backward from codes, {name}, {variant}", partial(launch, act_amax=act_amax)
        launch = partial(launch_quantize_swiglu, wide_rows, groups, None, tokens, **options)
        yield f"SwiGLU from codes, tokens, {variant}", launch
        yield f"SwiGLU from codes, long tokens, {variant}", partial(launch, tile_amax=tile_amax)
        launch = partial(launch_quantize_swiglu, wide_rows, groups, rows, None, **options)
        yield f"SwiGLU from codes, rows, {variant}", launch

    weights = torch.empty(300, dtype=torch.bfloat16)
    for dtype in FLOAT_DTYPES:
        x, data = torch.empty(300, 2 * 960, dtype=dtype), torch.empty(300, 960, dtype=torch.float8_e4m3fn)
        for group_size, (name, pow2, scale_dtype) in product(
            (96, 320),
            (("fp32", False, torch.float32), ("pow2", True, torch.float32), ("ue8m0", True, torch.int32)),
        ):
            scale = torch.empty(300, 960 // group_size, dtype=scale_dtype)
            launch = partial(
                launch_quantize_swiglu_rows, x, data, scale, gate_start=0, up_start=960, group_size=group_size,
                row_weights=weights, pow2=pow2, round_through_bf16=True, gate=SWIGLU,
            )  # fmt: skip
            yield f"SwiGLU of rows, {dtype}, {group_size}, {name}", launch


def gated_hopper_launches(groups: TokenGroups) -> Iterator[tuple[str, Callable[[], None]]]:
    """Variants of a kernel that fills the registers to the last."""
    features = 256
    rows, sums = RowOperand.empty(groups.capacity, 2 * features, CPU), torch.empty(features // 128, 300)
    tile_amax = torch.empty(groups.capacity // 128, features)
    inputs: list[tuple[torch.dtype, TokenLayout, Tensor | None]] = [
        (torch.bfloat16, TokenLayout.SIDE_BY_SIDE, torch.empty(300)),
        (torch.bfloat16, TokenLayout.SIDE_BY_SIDE, None),
        (torch.bfloat16, TokenLayout.PER_EXPERT, torch.empty(300)),
        (torch.bfloat16, TokenLayout.PER_EXPERT, None),
        (torch.float16, TokenLayout.SIDE_BY_SIDE, torch.empty(300, dtype=torch.bfloat16)),
    ]
    for (dtype, layout, row_weights), weight_parts, act_amax, pow2, stored in product(
        inputs, (sums, None), (None, tile_amax), (False, True), (False, True)
    ):
        x: Tensor | RowOperand = torch.empty(300, 2 * features, dtype=dtype)
        d_act = torch.empty(300, features, dtype=dtype)
        if stored:
            x = RowOperand.empty(groups.capacity, 2 * features, CPU)
        launch = partial(
            launch_quantize_swiglu_backward_hopper, d_act, x, groups, rows,
            TokenOperand.empty(groups.capacity, 2 * features, layout, CPU),
            TokenOperand.empty(groups.capacity, features, layout, CPU), weight_parts,
            row_weights=row_weights, pow2=pow2, act=GatedActivation(features, SWIGLU), act_amax=act_amax,
            multiprocessors=132,
        )  # fmt: skip
        weighted = "no weights" if row_weights is None else row_weights.dtype
        yield (
            f"SwiGLU backward, Gluon, {dtype}, {layout.value}, {weighted}, sums={weight_parts is not None}, "
            f"long={act_amax is not None}, pow2={pow2}{', from codes' if stored else ''}",
            launch,
        )


def other_gated_launches(groups: TokenGroups, act: GatedActivation) -> Iterator[tuple[str, Callable[[], None]]]:
    """The same kernels with another gate, a bias, or features that are padded: what differs in them."""
    halves, padded, live = act.gate.projections, act.padded_features, act.num_features
    rows, wide_rows = (RowOperand.empty(groups.capacity, size, CPU) for size in (padded, halves * padded))
    layout = TokenLayout.SIDE_BY_SIDE
    tokens, wide_tokens = (TokenOperand.empty(groups.capacity, size, layout, CPU) for size in (live, act.width))
    x, d_act = torch.empty(300, halves * padded, dtype=torch.bfloat16), torch.empty(300, padded, dtype=torch.bfloat16)
    sums, weights = torch.empty(padded // 128, 300), torch.empty(300)
    bias_sums = None if act.bias is None else torch.empty(groups.capacity // 128, act.width)
    tile_amax = torch.empty(groups.capacity // 128, live)
    tiles = LongTiles(256, tile_amax)
    options: dict[str, Any] = {"row_weights": weights, "pow2": False, "act": act}
    bias = "" if act.bias is None else ", bias"
    variant = f"{act.gate}{bias}, {live} features{', interleaved' if act.interleaved else ''}"
    forward = partial(launch_quantize_swiglu, x, groups, **options)
    yield f"{variant}, rows", partial(forward, rows, None)
    yield f"{variant}, rows and maxima", partial(forward, rows, None, measured=tiles)
    yield f"{variant}, rows and codes of x", partial(forward, rows, None, measured=tiles, x_rows=wide_rows)
    yield f"{variant}, both", partial(forward, rows, tokens)
    yield f"{variant}, long tokens", partial(forward, None, tokens, tile_amax=tile_amax)
    backward = partial(launch_quantize_swiglu_backward, d_act, x, groups, **options)
    yield f"{variant} backward, all", partial(backward, wide_rows, wide_tokens, tokens, sums, bias_sums)
    yield f"{variant} backward, frozen weights", partial(backward, wide_rows, None, None, sums, bias_sums)
    yield f"{variant} backward, tokens", partial(backward, None, wide_tokens, tokens, None, None, act_amax=tile_amax)
    stored = RowOperand.empty(groups.capacity, halves * padded, CPU)
    yield f"{variant} from codes, tokens", partial(launch_quantize_swiglu, stored, groups, None, tokens, **options)
    backward = partial(launch_quantize_swiglu_backward, d_act, stored, groups, **options)
    yield f"{variant} backward from codes, all", partial(backward, wide_rows, wide_tokens, tokens, sums, bias_sums)
    yield f"{variant} backward from codes, rows", partial(backward, wide_rows, None, None, sums, bias_sums)
    sources: tuple[Tensor | RowOperand, ...] = (x, stored)
    for pow2, amax, of in product((False, True), (None, tile_amax), sources):
        if has_twin(act):
            hopper = partial(launch_quantize_swiglu_backward_hopper, d_act, of, groups, wide_rows, wide_tokens, tokens)
            yield (
                f"{variant} backward, Gluon, pow2={pow2}, long={amax is not None}{', from codes' * (of is stored)}",
                partial(hopper, sums, multiprocessors=132, act_amax=amax, **(options | {"pow2": pow2})),
            )


def main() -> None:
    share, shares = (int(number) for number in (sys.argv[1] if len(sys.argv) > 1 else "0/1").split("/"))
    triton.runtime.driver.set_active(OfflineDriver())
    compiled: list[tuple[str, Any]] = []
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__, compile_only(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = run
    if share == 0:
        sys.stdout.write(json.dumps({"package": sorted(kernels_of_package())}) + "\n")
    for variant, launch in islice(launches(), share, None, shares):
        before = len(compiled)
        launch()
        for name, kernel in compiled[before:]:
            usage = {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
            sys.stdout.write(json.dumps({"kernel": name, "variant": variant, **usage}) + "\n")


if __name__ == "__main__":
    main()
