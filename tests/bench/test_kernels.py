"""Every kernel row checks what it times."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8moe import KernelPreference
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.kernels import Kernel, sectors_of_every
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import measure_kernel
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Shape, layer_shape, product_shape
from fp8moe.bench.variants import bf16_op
from fp8moe.quantize.messages import Messages
from tests.bench.support import CPU, GPT_OSS_SHAPE, LAYER_SHAPE, SHAPE, small_lab, small_layer, small_problem

EXPECTED = small_problem().products(bf16_op)
EMULATED = {KernelPreference.EMULATED}
ONE_WEIGHT = [
    "quantize_weight_for_forward",
    "quantize_weight_for_dgrad",
    "quantize_weight_into",
    "transpose_codes",
    "WeightCache, unchanged",
    "WeightCache, changed",
]
GEMMS = ["emulated forward", "emulated dgrad", "emulated wgrad"]


def rows_of_product(preferences: set[KernelPreference]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in PRODUCT.kernels(SHAPE, small_problem(), EXPECTED, preferences)}


def rows_of_layer(preferences: set[KernelPreference]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in LAYER.kernels(LAYER_SHAPE, small_layer(), {}, preferences)}


@pytest.fixture(scope="module")
def product() -> dict[str, Kernel]:
    return rows_of_product(EMULATED)


@pytest.fixture(scope="module")
def layer() -> dict[str, Kernel]:
    return rows_of_layer(EMULATED)


@pytest.fixture(scope="module")
def rows(product: dict[str, Kernel], layer: dict[str, Kernel]) -> dict[str, Kernel]:
    return product | layer


def test_every_function_of_a_product_has_a_row(product: dict[str, Kernel]) -> None:
    assert list(product) == [
        "plan_groups",
        "ends_within",
        "quantize_rows",
        "quantize_tokens, side by side",
        "quantize_rows_and_tokens, side by side",
        "quantize_rows_and_tokens, side by side, tiles of 256",
        "quantize_rows_and_tokens, side by side, tiles of 512",
        "unpad",
        "zero_unused_rows_",
        *ONE_WEIGHT,
        "BF16 forward",
        "BF16 dgrad",
        "BF16 wgrad",
        *GEMMS,
    ]
    bf16 = [name for name, kernel in product.items() if kernel.is_bf16]
    assert bf16 == ["BF16 forward", "BF16 dgrad", "BF16 wgrad"]


def test_every_function_of_a_layer_has_a_row(layer: dict[str, Kernel]) -> None:
    tiles = ("", ", tiles of 256", ", tiles of 512")
    assert list(layer) == [
        "Routing.from_topk",
        "quantize_swiglu",
        "swiglu_quantize",
        "quantize_swiglu_forward, tiles of 256",
        "quantize_swiglu_forward, tiles of 512",
        "quantize_swiglu_forward, FP8 storage",
        *(f"quantize_swiglu_backward, side by side{tile}" for tile in (*tiles, ", FP8 storage")),
        "quantize_and_spread_rows",
        *(
            f"{name}, gathering, side by side{tile}"
            for tile in tiles
            for name in ("quantize_tokens", "quantize_rows_and_tokens")
        ),
        "pack, e4m3",
        "pack, bf16",
        "spread_messages",
        "requantize_messages, side by side",
        "combine",
        "note_not_finite, two",
        "add_sample_sums",
        *(f"{part}: {name}" for part in ("gate_up", "down") for name in (*ONE_WEIGHT, *GEMMS)),
    ]


def test_each_backends_layout_has_its_rows() -> None:
    assert {"quantize_swiglu_backward, per expert", "quantize_swiglu_backward, side by side"} <= set(
        rows_of_layer({KernelPreference.EMULATED, KernelPreference.DEEPGEMM})
    )
    without_backends = list(rows_of_product(set()))
    assert "quantize_tokens, side by side" in without_backends
    assert without_backends[-1] == "BF16 wgrad"


def test_every_row_is_right_and_has_a_floor(product: dict[str, Kernel], rows: dict[str, Kernel]) -> None:
    for name, kernel in rows.items():
        problem = small_problem() if name in product else small_layer()
        found = measure_kernel(kernel, problem, EXPECTED, small_lab())
        assert found.name == name
        assert found.timing.median_ms > 0
        assert found.sqnr_db > (45 if kernel.is_bf16 else 25)
        assert found.bytes > 0
        assert found.floor_ms is not None
        assert (found.flops > 0) == ("emulated" in name or "BF16" in name)
        if not found.flops:
            assert found.floor_ms == pytest.approx(found.bytes / 1e9 * 1e3)


@pytest.mark.parametrize("shape", [GPT_OSS_SHAPE, layer_shape(200, 2, 104, 72, 3)], ids=["gpt-oss", "plain"])
def test_every_row_of_a_layer_that_fp8_pads_is_right(shape: Shape) -> None:
    problem = small_layer(shape)
    rows = {kernel.name: kernel for kernel in LAYER.kernels(shape, problem, {}, EMULATED)}
    assert set(rows) == set(rows_of_layer(EMULATED)) - {"swiglu_quantize"}
    for kernel in rows.values():
        assert measure_kernel(kernel, problem, EXPECTED, small_lab()).sqnr_db > 25


def test_every_row_of_a_product_that_fp8_pads_is_right() -> None:
    shape = product_shape(200, 104, 72, 3)
    problem = PRODUCT.problem(shape, PRODUCT.balances[0], CPU, 0)
    expected = problem.products(bf16_op)
    rows = list(PRODUCT.kernels(shape, problem, expected, EMULATED))
    assert [kernel.name for kernel in rows] == list(rows_of_product(EMULATED))
    for kernel in rows:
        assert measure_kernel(kernel, problem, expected, small_lab()).sqnr_db > 25


def other_map(routing: Any) -> Any:
    changed = routing.choice_row.clone()
    changed[5, 0] += 1
    return dataclasses.replace(routing, choice_row=changed)


def other_scales(operand: Any) -> Any:
    return dataclasses.replace(operand, stored_scale=operand.stored_scale.roll(1, dims=0))


def other_scales_of(name: str) -> Callable[[Any], Any]:
    return lambda made: dataclasses.replace(made, **{name: other_scales(getattr(made, name))})


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("emulated forward", torch.zeros_like, r"out is wrong: SQNR 0\.0 dB"),
        ("emulated dgrad", torch.zeros_like, r"d_a is wrong: SQNR 0\.0 dB"),
        ("emulated wgrad", torch.zeros_like, r"d_w is wrong: SQNR 0\.0 dB"),
        ("down: emulated wgrad", torch.zeros_like, r"d_w is wrong: SQNR 0\.0 dB"),
        (
            "quantize_rows_and_tokens, side by side",
            lambda made: (made[0], other_scales(made[1])),
            "tokens is wrong",
        ),
        (
            "quantize_weight_into",
            lambda made: (made[0], dataclasses.replace(made[1], scale=2 * made[1].scale)),
            "weight is wrong",
        ),
        ("Routing.from_topk", other_map, "map 6 is wrong"),
        (
            "quantize_swiglu",
            lambda made: (dataclasses.replace(made[0], stored_scale=2 * made[0].stored_scale), None),
            "rows is wrong",
        ),
        (
            "quantize_swiglu_forward, tiles of 256",
            lambda made: dataclasses.replace(
                made, long_tiles=dataclasses.replace(made.long_tiles, amax=made.long_tiles.amax.roll(1, dims=1))
            ),
            "maxima is wrong",
        ),
        ("quantize_swiglu_forward, FP8 storage", other_scales_of("x_rows"), "rows of x is wrong"),
        ("quantize_swiglu_backward, side by side, FP8 storage", other_scales_of("d_x_tokens"), "d_x_tokens is wrong"),
        ("quantize_swiglu_backward, side by side", other_scales_of("d_x_tokens"), "d_x_tokens is wrong"),
        ("quantize_swiglu_backward, side by side", other_scales_of("act_tokens"), "act_tokens is wrong"),
        ("quantize_swiglu_backward, side by side, tiles of 512", other_scales_of("act_tokens"), "act_tokens is wrong"),
        (
            "quantize_swiglu_backward, side by side",
            lambda made: dataclasses.replace(made, d_row_weights=made.d_row_weights.roll(1, dims=1)),
            "d_row_weights is wrong",
        ),
        ("pack, e4m3", lambda made: Messages(made.data.roll(1, dims=0), made.layout), "messages is wrong"),
        ("spread_messages", other_scales, "rows is wrong"),
        ("requantize_messages, side by side", other_scales, "tokens is wrong"),
        ("combine", lambda out: out.index_fill(0, out.new_tensor([3]).long(), 0.0), "sums is wrong"),
        ("note_not_finite, two", lambda first: first + 1, "nothing found is wrong"),
        ("add_sample_sums", lambda sums: sums.index_fill(1, sums.new_tensor([2]).long(), 0.0), "sums of rows is wrong"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_timed(
    rows: dict[str, Kernel], name: str, spoil: Callable[[Any], Any], message: str
) -> None:
    right = rows[name]
    wrong = dataclasses.replace(right, run=lambda: spoil(right.run()))
    with pytest.raises(WrongResultError, match=message):
        measure_kernel(wrong, small_problem(), EXPECTED, small_lab())


def test_a_look_for_what_is_not_finite_that_does_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.bench.layer.kernels.note_not_finite", lambda *_: None)
    row = rows_of_layer(EMULATED)["note_not_finite, two"]
    with pytest.raises(WrongResultError, match="NaN found is wrong"):
        measure_kernel(row, small_layer(), {}, small_lab())


@pytest.mark.parametrize(
    ("dtype", "every", "num_bytes"),
    [(torch.bfloat16, 128, 5 * 3 * 32), (torch.float32, 128, 5 * 3 * 32), (torch.bfloat16, 4, 5 * 300 * 2)],
)
def test_columns_that_lie_apart_are_sectors(dtype: torch.dtype, every: int, num_bytes: int) -> None:
    assert sectors_of_every(every, torch.empty(5, 300, dtype=dtype)).nbytes == num_bytes
