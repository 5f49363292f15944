"""Every row of the layer's kernels checks what it times."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from fp8moe import KernelPreference
from fp8moe.bench.guard import WrongResultError
from fp8moe.bench.kernels import Kernel, measure_kernel
from fp8moe.bench.layer.baseline import bf16_layer
from fp8moe.bench.layer.kernels import layer_kernels
from fp8moe.bench.problem import Products
from tests.bench.support import CPU, small_lab, small_layer


@pytest.fixture(scope="module")
def expected() -> Products:
    return small_layer().products(bf16_layer(CPU).op)


@pytest.fixture(scope="module")
def rows() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in layer_kernels(small_layer(), {KernelPreference.EMULATED})}


def test_every_function_has_a_row(rows: dict[str, Kernel]) -> None:
    assert list(rows) == [
        "Routing.from_topk",
        "quantize_swiglu",
        "swiglu_quantize",
        "swiglu, then quantize_rows",
        "quantize_swiglu_and_measure, tiles of 256",
        "quantize_swiglu_and_measure, tiles of 512",
        "dequantize_rows",
        *(
            f"{name}, side by side{tiles}"
            for name in ("quantize_rows_and_tokens, gathering", "quantize_swiglu_backward")
            for tiles in ("", ", tiles of 256", ", tiles of 512")
        ),
        "combine",
        *(
            f"{part}: {name}"
            for part in ("gate_up", "down")
            for name in (
                "quantize_weight_for_forward",
                "quantize_weight_for_dgrad",
                "emulated forward",
                "emulated dgrad",
                "emulated wgrad",
            )
        ),
    ]
    both = layer_kernels(small_layer(), {KernelPreference.EMULATED, KernelPreference.DEEPGEMM})
    assert {"quantize_swiglu_backward, per expert", "quantize_swiglu_backward, side by side"} <= {
        kernel.name for kernel in both
    }


def test_rates_are_work_over_time(rows: dict[str, Kernel], expected: Products) -> None:
    for name, kernel in rows.items():
        found = measure_kernel(kernel, expected, small_lab())
        assert found.name == name
        assert (found.flops > 0) == ("emulated" in name)
        assert found.sqnr_db > 25
        assert found.gb_s == pytest.approx(found.bytes / found.timing.median_ms / 1e6)
        if not found.flops:
            assert found.floor_ms == pytest.approx(found.bytes / 1e9 * 1e3)


def _other_map(routing: Any) -> Any:
    changed = routing.choice_row.clone()
    changed[5, 0] += 1
    return dataclasses.replace(routing, choice_row=changed)


def _other_scales(name: str) -> Callable[[Any], Any]:
    def change(made: Any) -> Any:
        operand = getattr(made, name)
        return dataclasses.replace(
            made, **{name: dataclasses.replace(operand, stored_scale=operand.stored_scale.roll(1, dims=0))}
        )

    return change


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("Routing.from_topk", _other_map, "map 6 is wrong"),
        (
            "quantize_swiglu",
            lambda made: (dataclasses.replace(made[0], stored_scale=2 * made[0].stored_scale), None),
            "rows is wrong",
        ),
        (
            "quantize_swiglu_and_measure, tiles of 256",
            lambda made: (made[0], dataclasses.replace(made[1], amax=made[1].amax.roll(1, dims=1))),
            "maxima is wrong",
        ),
        ("dequantize_rows", lambda rows: rows.roll(1, dims=0), "rows is wrong"),
        ("quantize_swiglu_backward, side by side", _other_scales("d_x_tokens"), "d_x_tokens is wrong"),
        ("quantize_swiglu_backward, side by side", _other_scales("act_tokens"), "act_tokens is wrong"),
        ("quantize_swiglu_backward, side by side, tiles of 512", _other_scales("act_tokens"), "act_tokens is wrong"),
        (
            "quantize_swiglu_backward, side by side",
            lambda made: dataclasses.replace(made, d_row_weights=made.d_row_weights.roll(1)),
            "d_row_weights is wrong",
        ),
        ("combine", lambda out: out.index_fill(0, out.new_tensor([3]).long(), 0.0), "sums is wrong"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_timed(
    rows: dict[str, Kernel], expected: Products, name: str, spoil: Callable[[Any], Any], message: str
) -> None:
    right = rows[name]
    wrong = dataclasses.replace(right, run=lambda: spoil(right.run()))
    with pytest.raises(WrongResultError, match=message):
        measure_kernel(wrong, expected, small_lab())
