"""Kernels: `Routing` by a stable counting sort: few choices in one launch, many in three: count, scan, place."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.launch import ceil_div, launch, power_of_2_from

MIN_CHUNK = 128  # choices counted and placed by a program: a thread each
FEW = 4096  # so many choices each program counts itself, in less time than two more launches take
ELEMENTS = 2048  # compared at once by a program: choices with choices
COUNTS = 1024  # counted or scanned at once by a program
PADDING = tl.constexpr(128)  # rows of a group come in multiples of it


@triton.jit
def place_of(choice, stride, CHOICES: tl.constexpr):
    """Where a choice lies: tokens of CHOICES choices are `stride` apart, or contiguous if CHOICES is 0."""
    place = choice
    if CHOICES:
        place = (choice // CHOICES).to(tl.int64) * stride + choice % CHOICES
    return place


@triton.jit
def chosen_experts(topk_ids, choice, stride_ids, M, E, CHOICES: tl.constexpr):
    """int32: the expert of each choice, E for none and past the last."""
    place = place_of(choice, stride_ids, CHOICES)
    ids = tl.load(topk_ids + place, mask=choice < M, other=0).to(tl.int64)  # before E is compared in a narrow type
    return tl.where((choice < M) & (ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def count_choices_kernel(
    topk_ids,  # integers, M of them, see `place_of`
    counts,  # int32 (E, chunks): how many choices of each chunk go to each expert
    stride_ids, M, E, chunks,
    CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program counts CHUNK choices; CHUNK is at least E, here and below."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, CHUNK)
    chosen = chosen_experts(topk_ids, chunk * CHUNK + expert, stride_ids, M, E, CHOICES)
    count = tl.histogram(chosen, CHUNK, mask=chosen < E)
    tl.store(counts + expert.to(tl.int64) * chunks + chunk, count, mask=expert < E)


@triton.jit
def scan_counts_kernel(
    counts,  # int32 (E, chunks): becomes how many of the choices of all earlier chunks go to the expert
    sizes,  # int32 (E,): how many of all choices do
    chunks,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """One program scans the counts of one expert."""
    expert = tl.program_id(0)
    size = 0
    for start in range(0, chunks, COUNTS):
        chunk = start + tl.arange(0, COUNTS)
        place = counts + expert.to(tl.int64) * chunks + chunk
        count = tl.load(place, mask=chunk < chunks, other=0)
        tl.store(place, size + tl.cumsum(count, axis=0) - count, mask=chunk < chunks)
        size += tl.sum(count, axis=0)
    tl.store(sizes + expert, size)


@triton.jit
def count_few_choices(
    topk_ids, end, stride_ids, M, E, CHOICES: tl.constexpr, CHUNK: tl.constexpr, COUNTS: tl.constexpr
):
    """int32 (CHUNK,) each: how many of all choices, and of those before `end`, go to each expert."""
    size = tl.zeros((CHUNK,), tl.int32)
    earlier = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, M, COUNTS):
        choice = start + tl.arange(0, COUNTS)
        chosen = chosen_experts(topk_ids, choice, stride_ids, M, E, CHOICES)
        size += tl.histogram(chosen, CHUNK, mask=chosen < E)
        earlier += tl.histogram(chosen, CHUNK, mask=(chosen < E) & (choice < end))
    return size, earlier


@triton.jit
def place_choices_kernel(
    topk_ids,
    topk_weights,  # of any float dtype, likewise, or None
    counts, sizes,  # from the kernels above, or None: then each program counts
    ends,  # as in TokenGroups
    padded_ends, row_expert, row_source, token_row, row_token,  # as in TokenGroups and Routing, or None: no padded rows
    choice_row,  # as in Routing
    row_weights,  # as in Routing, or None
    stride_ids, stride_weights, M, R, E, choices_per_token, chunks,
    CHOICES: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One program places CHUNK choices, pads the group of one expert, and clears what is unused of CHUNK rows."""
    program = tl.program_id(0)
    expert = tl.arange(0, CHUNK)
    if counts is None:
        size, earlier = count_few_choices(topk_ids, program * CHUNK, stride_ids, M, E, CHOICES, CHUNK, COUNTS)
    else:
        size = tl.load(sizes + expert, mask=expert < E, other=0)
        counted = (expert < E) & (program < chunks)
        earlier = tl.load(counts + expert.to(tl.int64) * chunks + program, mask=counted, other=0)
    padded_size = (size + (PADDING - 1)) // PADDING * PADDING
    end = tl.cumsum(size, axis=0)
    padded_end = tl.cumsum(padded_size, axis=0)
    if program == 0:
        tl.store(ends + expert, end, mask=expert < E)
        if padded_ends is not None:
            tl.store(padded_ends + expert, padded_end, mask=expert < E)

    index = program * CHUNK + tl.arange(0, CHUNK)  # of choices, of ragged rows and of padded rows
    if program < chunks:
        chosen = chosen_experts(topk_ids, index, stride_ids, M, E, CHOICES)
        # The rank in the chunk: how many earlier choices in it are of the same expert.
        ranks = tl.zeros((STEP, CHUNK), tl.int32)  # in parts
        for start in range(0, CHUNK, STEP):
            other = program * CHUNK + start + tl.arange(0, STEP)
            same = chosen_experts(topk_ids, other, stride_ids, M, E, CHOICES)[:, None] == chosen[None, :]
            ranks += (same & (other[:, None] < index[None, :])).to(tl.int32)
        live = chosen < E
        group = tl.where(live, chosen, 0)
        rank = tl.sum(ranks, axis=0) + tl.gather(earlier, group, axis=0)
        row = tl.gather(end - size, group, axis=0) + rank
        if padded_ends is not None:
            padded_row = tl.gather(padded_end - padded_size, group, axis=0) + rank
        tl.store(choice_row + index, tl.where(live, row, -1), mask=index < M)
        if padded_ends is not None:
            tl.store(token_row + row, padded_row, mask=live)
            tl.store(row_expert + padded_row, chosen, mask=live)
            tl.store(row_source + padded_row, row, mask=live)
            tl.store(row_token + padded_row, index // choices_per_token, mask=live)
        if topk_weights is not None:
            weight = tl.load(topk_weights + place_of(index, stride_weights, CHOICES), mask=live)
            tl.store(row_weights + row, weight, mask=live)

    if padded_ends is not None:
        # Each program clears the padding of the group of its number, and of its own rows those that no group uses.
        used = tl.sum(tl.where(expert == program, size, 0), axis=0)
        padding_start = tl.sum(tl.where(expert < program, padded_size, 0), axis=0) + used
        position = tl.arange(0, PADDING)
        padding = used + position < (used + (PADDING - 1)) // PADDING * PADDING
        clear_rows(padding_start + position, padding, row_expert, row_source, row_token)
        unused = (index >= tl.sum(padded_size, axis=0)) & (index < R)
        clear_rows(index, unused, row_expert, row_source, row_token)
        tl.store(token_row + index, -1, mask=(index >= tl.sum(size, axis=0)) & (index < M))


@triton.jit
def clear_rows(row, mask, row_expert, row_source, row_token):
    """Padded rows that copy nothing."""
    tl.store(row_expert + row, -1, mask=mask)
    tl.store(row_source + row, -1, mask=mask)
    tl.store(row_token + row, -1, mask=mask)


def launch_route(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int, routing: list[Tensor]) -> None:
    """Fill `routing`, the tensors of a `Routing`, from `topk_ids` and `topk_weights`, whose choices are contiguous."""
    ends, *maps, choice_row = routing[:7]
    row_weights = None if topk_weights is None else routing[7]
    # There are at least as many padded rows as choices.
    _launch(topk_ids, topk_weights, num_experts, maps[1].shape[0], num_experts, ends, *maps, choice_row, row_weights)


def launch_route_choices(topk_ids: Tensor, num_experts: int, ends: Tensor, choice_row: Tensor) -> None:
    """Fill these two tensors of a `Routing` alone, from `topk_ids`, whose choices are contiguous."""
    maps = (None, None, None, None, None)
    _launch(topk_ids, None, num_experts, topk_ids.numel(), 1, ends, *maps, choice_row, None)


def _launch(
    topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int, rows: int, least_programs: int, ends: Tensor,
    *tensors: Tensor | None,
) -> None:  # fmt: skip
    """`rows`, and `ends` and `tensors` as the kernel takes them; at least `least_programs`."""
    num_choices = topk_ids.numel()
    # With a chunk for each E choices, E counts a chunk take about the memory of one map.
    chunk = max(power_of_2_from(num_experts), MIN_CHUNK)
    chunks = ceil_div(num_choices, chunk)
    counts = sizes = None
    stride_ids, stride_weights = topk_ids.stride(0), 0 if topk_weights is None else topk_weights.stride(0)
    contiguous = topk_ids.is_contiguous() and (topk_weights is None or topk_weights.is_contiguous())
    choices = 0 if contiguous else topk_ids.shape[1]
    if num_choices > FEW:
        counts, sizes = ends.new_empty(num_experts, chunks), ends.new_empty(num_experts)
        launch(
            count_choices_kernel, chunks, topk_ids, counts, stride_ids, num_choices, num_experts, chunks,
            CHOICES=choices, CHUNK=chunk,
        )  # fmt: skip
        launch(scan_counts_kernel, num_experts, counts, sizes, chunks, COUNTS=COUNTS)
    launch(
        place_choices_kernel, max(ceil_div(rows, chunk), least_programs),
        topk_ids, topk_weights, counts, sizes, ends, *tensors,
        stride_ids, stride_weights, num_choices, rows, num_experts, topk_ids.shape[1], chunks,
        CHOICES=choices, CHUNK=chunk, STEP=ELEMENTS // chunk, COUNTS=COUNTS
    )  # fmt: skip
