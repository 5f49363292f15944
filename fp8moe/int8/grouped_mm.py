"""The grouped product of int8 rows with the INT8 or INT4 weights of their experts: exact sums, scaled in groups."""

from typing import Literal

import torch
from torch import Tensor

from fp8moe.checks import FLOAT_DTYPES, check_device, check_float, check_same_device, check_tensors
from fp8moe.devices import runs_triton
from fp8moe.int8.checks import check_size, check_vector
from fp8moe.int8.groups import RowTiles, plan_tiles
from fp8moe.int8.rows import check_layout, swiglu_values, with_contiguous_rows
from fp8moe.int8.scaled_mm import MAX_FEATURES
from fp8moe.int8.weights import unpack_int4
from fp8moe.rows.unused_rows import zero_unused_rows_
from fp8moe.torch_op import torch_op

MAX_WEIGHT_BYTES = 2**31 - 1
"""Of one expert: within it the kernel counts in int32."""
BLOCK_K = (32, 64, 128, 256, 512)
"""What may be named."""
Epilogue = Literal["swiglu"]


def int8_grouped_mm(
    a_q: Tensor,
    a_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    group_size: int,
    epilogue: Epilogue | None = None,
    *,
    layout: str = "gate_up",
    a_tile: int | None = None,
    row_source: Tensor | None = None,
    row_weights: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tiles: RowTiles | None = None,
    block_k: int | None = None,
    lossless_fp16: bool | None = None,
) -> Tensor:
    """`out[m] = a[m] @ w[e].T` of the rows m of each expert e, of the quantized operands.

    The products of all elements of K that share their scales are summed as integers, exactly, and that sum is scaled
    and added up in fp32. Nothing is read on the host.

    Args:
        a_q: int8 `(M, K)`; with a `row_source` any number of rows, such as the tokens.
        a_scale: fp32 `(rows of a_q, 1)`, or with an `a_tile` `(rows of a_q, ceil(K / a_tile))`.
        w_q: int8 `(E, N, K)`; or uint8 `(E, N / 2, K)`, two rows a byte, as `pack_int4(dim=1)` makes it. Contiguous.
        w_scale: fp32 `(E, N, ceil(K / group_size))`; fastest where N is the contiguous dimension.
        offsets: int32 `(E,)`: end row of each expert, non-decreasing.
        group_size: elements of K that share a scale of the weight; K or more: all.
        epilogue: "swiglu": the weight is gate and up, `silu(gate) * up` (in fp32) is returned, `(M, N / 2)`.
        layout: which half of the weight is the gate's: "gate_up" or "up_gate".
        a_tile: elements of K that share a scale of a row, a multiple or a divisor of `group_size`; None: all.
        row_source: int32 `(M,)`: the row of `a_q` that each row is.
        row_weights: float `(M,)`: what to multiply each row by, in fp32.
        out_dtype: bf16, fp16 or fp32.
        tiles: the plan of `offsets`, shared by the steps of a layer. The result's rows of no group are unspecified
            then; without it they are zeros.
        block_k: elements of K at a time, a power of two from 32 to 512. The bits of the result do not depend on it, as
            long as the compiler fuses alike. None: what suits; then scaled sums of few rows may be added up in another
            order than those of many.
        lossless_fp16: multiply in fp16, in which int8 and their sums are as exact; None: where the platform needs it.

    Returns:
        `(M, N)`, or `(M, N / 2)`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, size or device.
    """
    check_tensors({"a_q": a_q, "a_scale": a_scale, "w_q": w_q, "w_scale": w_scale, "offsets": offsets})
    _check_operands(a_q, a_scale, w_q, w_scale, group_size, a_tile)
    check_vector(offsets, "offsets", w_q.shape[0], torch.int32, a_q, "a_q")
    for name, rows, dtype in (("row_source", row_source, torch.int32), ("row_weights", row_weights, None)):
        if rows is not None:
            size = a_q.shape[0] if row_source is None else row_source.numel()
            check_vector(rows, name, size, dtype, a_q, "a_q")
    if row_weights is not None:
        check_float(row_weights, "row_weights", double=True)
    if epilogue not in (None, "swiglu"):
        raise ValueError(f"epilogue is {epilogue!r}; it must be None or 'swiglu'")
    check_layout(layout)
    if epilogue and w_q.shape[1] % 2:
        raise ValueError(f"w_q has shape {tuple(w_q.shape)}; with SwiGLU its rows are two halves of whole bytes")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}")
    if block_k is not None and block_k not in BLOCK_K:
        raise ValueError(f"block_k is {block_k!r}; it must be one of {', '.join(map(str, BLOCK_K))}")
    num_rows = a_q.shape[0] if row_source is None else row_source.shape[0]
    bits = 8 if w_q.dtype == torch.int8 else 4
    planned = plan_tiles(offsets, num_rows, weight_bits=bits, tiled=a_scale.shape[1] > 1) if tiles is None else tiles
    if planned.num_rows != num_rows or planned.ends.shape != offsets.shape:
        raise ValueError(
            f"tiles plans {planned.num_rows} rows in {planned.ends.shape[0]} groups, and there are {num_rows} in "
            f"{offsets.shape[0]}: plan them anew"
        )
    out = _int8_grouped_mm(
        a_q, a_scale, w_q, w_scale, planned.tensors, planned.block_rows, group_size, a_tile, epilogue is not None,
        layout == "up_gate", row_source, row_weights, out_dtype, block_k, lossless_fp16,
    )  # fmt: skip
    return out if tiles is not None or num_rows == 0 else zero_unused_rows_(out, planned.ends)


def units_of(num_features: int, group_size: int, a_tile: int | None) -> tuple[int, int, int]:
    """How many elements of K share all scales, how many such units a scale of the weight has, and one of the rows (0:
    all of K, whose scale waits for the end)."""
    group = min(group_size, num_features)
    if a_tile is None or a_tile >= num_features:
        return group, 1, 0
    unit = min(group, a_tile)
    return unit, -(-group // unit), a_tile // unit


def check_units(num_features: int, group_size: int, a_tile: int | None, name: str) -> None:
    """That the group of the weight and the tile of the rows, called `name`, fit each other."""
    check_size(group_size, "group_size")
    unit = min(group_size, num_features)
    if a_tile is not None:
        check_size(a_tile, name)
        shorter, longer = sorted((min(a_tile, num_features), unit))
        unit = shorter
        if longer % shorter and longer != num_features:
            raise ValueError(
                f"{name} is {a_tile} and group_size {group_size}; one must be a multiple of the other: a sum of "
                "integers has one scale of each"
            )
    if unit > MAX_FEATURES:
        raise ValueError(
            f"group_size is {group_size}; sums of {unit} products do not fit into int32: {MAX_FEATURES} do"
        )


def _check_operands(
    a_q: Tensor, a_scale: Tensor, w_q: Tensor, w_scale: Tensor, group_size: int, a_tile: int | None
) -> None:
    """That they fit each other: the tile of the rows, the group of the weight, and K."""
    if a_q.dim() != 2 or a_q.dtype != torch.int8:
        raise TypeError(f"a_q is {a_q.dtype} of shape {tuple(a_q.shape)}; it must be torch.int8 (M, K)")
    check_device(a_q, "a_q")
    if w_q.dim() != 3 or w_q.dtype not in (torch.int8, torch.uint8):
        raise TypeError(
            f"w_q is {w_q.dtype} of shape {tuple(w_q.shape)}; it must be torch.int8 (E, N, K), or packed torch.uint8 "
            "(E, N / 2, K)"
        )
    num_features = a_q.shape[1]
    if w_q.shape[2] != num_features or 0 in w_q.shape:
        raise ValueError(f"w_q has shape {tuple(w_q.shape)} and a_q {tuple(a_q.shape)}; both must have the same K")
    if not w_q.is_contiguous():
        raise ValueError("w_q is not contiguous; its rows of K must lie one after the other: call w_q.contiguous()")
    if w_q.shape[1] * num_features > MAX_WEIGHT_BYTES:
        raise ValueError(f"w_q has shape {tuple(w_q.shape)}; one expert may have {MAX_WEIGHT_BYTES} bytes at most")
    check_units(num_features, group_size, a_tile, "a_tile")
    num_rows = w_q.shape[1] * (2 if w_q.dtype == torch.uint8 else 1)
    tile = num_features if a_tile is None else a_tile
    for name, scale, shape, fix in (
        ("a_scale", a_scale, (a_q.shape[0], -(-num_features // tile)), f"a_tile={a_tile}"),
        ("w_scale", w_scale, (w_q.shape[0], num_rows, -(-num_features // group_size)), f"group_size={group_size}"),
    ):
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {scale.dtype}; it must be torch.float32")
        if scale.shape != shape:
            raise ValueError(f"{name} has shape {tuple(scale.shape)}; with {fix} it must be {shape}")
        check_same_device(scale, name, a_q, "a_q")
    check_same_device(w_q, "w_q", a_q, "a_q")


def grouped_mm_by_loop(
    a_q: Tensor, a_scale: Tensor, w_q: Tensor, w_scale: Tensor, ends: Tensor, group_size: int, a_tile: int | None,
    swiglu: bool, up_first: bool, row_source: Tensor | None, row_weights: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`int8_grouped_mm` in plain PyTorch, an expert at a time: the definition. Integers below 2**53 are exact in fp64.
    Rows of no group are zeros."""
    num_features = a_q.shape[1]
    unit, units_of_w, units_of_a = units_of(num_features, group_size, a_tile)
    codes, scales = (a_q, a_scale) if row_source is None else (a_q[row_source.long()], a_scale[row_source.long()])
    num_columns = w_scale.shape[1] // (2 if swiglu else 1)
    out = torch.zeros(codes.shape[0], num_columns, dtype=out_dtype, device=a_q.device)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        start = end
        w = w_q[expert] if w_q.dtype == torch.int8 else unpack_int4(w_q[expert], dim=0)
        total = torch.zeros(codes[rows].shape[0], w.shape[0], device=a_q.device)
        parts = zip(codes[rows].split(unit, dim=1), w.split(unit, dim=1), strict=True)
        for number, (a_part, w_part) in enumerate(parts):
            sums = (a_part.double() @ w_part.double().t()).float()
            scale = w_scale[expert, :, number // units_of_w]
            if units_of_a:
                scale = scale * scales[rows, number // units_of_a, None]
            total = torch.addcmul(total.double(), sums.double(), scale.double()).float()  # fused, as the kernel does
        if not units_of_a:
            total = total * scales[rows]
        result = swiglu_values(total, up_first) if swiglu else total
        if row_weights is not None:
            result = result * row_weights[rows, None].float()
        out[rows] = result.to(out_dtype)
    return out


def _empty_product(
    a_q: Tensor, a_scale: Tensor, w_q: Tensor, w_scale: Tensor, tiles: list[Tensor], block_rows: int, group_size: int,
    a_tile: int | None, swiglu: bool, up_first: bool, row_source: Tensor | None, row_weights: Tensor | None,
    out_dtype: torch.dtype, block_k: int | None, lossless_fp16: bool | None,
) -> Tensor:  # fmt: skip
    num_rows = a_q.shape[0] if row_source is None else row_source.shape[0]
    return a_q.new_empty((num_rows, w_scale.shape[1] // (2 if swiglu else 1)), dtype=out_dtype)


@torch_op(fake=_empty_product)
def _int8_grouped_mm(
    a_q: Tensor, a_scale: Tensor, w_q: Tensor, w_scale: Tensor, tiles: list[Tensor], block_rows: int, group_size: int,
    a_tile: int | None, swiglu: bool, up_first: bool, row_source: Tensor | None, row_weights: Tensor | None,
    out_dtype: torch.dtype, block_k: int | None, lossless_fp16: bool | None,
) -> Tensor:  # fmt: skip
    if not runs_triton(a_q.device):
        return grouped_mm_by_loop(
            a_q, a_scale, w_q, w_scale, tiles[0], group_size, a_tile, swiglu, up_first, row_source, row_weights,
            out_dtype,
        )  # fmt: skip
    from fp8moe.kernels.int8.grouped_mm import launch_int8_grouped_mm
    from fp8moe.kernels.int8.platform import GroupedProduct, grouped_tile, platform_of

    out = a_q.new_empty(
        (a_q.shape[0] if row_source is None else row_source.shape[0], w_scale.shape[1] // (2 if swiglu else 1)),
        dtype=out_dtype,
    )
    if out.shape[0] == 0:
        return out
    num_features, platform = a_q.shape[1], platform_of(a_q.device)
    unit, units_of_w, units_of_a = units_of(num_features, group_size, a_tile)
    product = GroupedProduct(
        block_rows, unit, units_of_w, units_of_a, num_features, w_q.dtype == torch.uint8, swiglu,
        in_fp16=platform.in_fp16 if lossless_fp16 is None else lossless_fp16, row_tiles=tiles[2].shape[0],
        part_rows=w_q.shape[1] // (2 if swiglu else 1),
    )  # fmt: skip
    source, weights = (None if x is None else x.contiguous() for x in (row_source, row_weights))
    launch_int8_grouped_mm(
        with_contiguous_rows(a_q), a_scale.contiguous(), source, w_q, w_scale, tiles, weights, out,
        product=product, up_first=up_first, tile=grouped_tile(platform, product, block_k), platform=platform,
    )  # fmt: skip
    return out
