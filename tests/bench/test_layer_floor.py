"""The work of a layer's kernels against numbers worked out by hand, and against the tensors themselves."""

from dataclasses import replace

import pytest
import torch
from fp8moe.routing import Routing

from fp8moe.bench.floor import Precision, Work
from fp8moe.bench.layer import floor
from fp8moe.bench.layer.floor import LayerSizes
from fp8moe.bench.layer.shapes import LayerShape, TopkRouting, draw_topk
from fp8moe.config import ScaleFormat
from fp8moe.operands import TokenLayout
from fp8moe.quantize import quantize_rows_and_tokens
from fp8moe.quantize.swiglu import quantize_swiglu, quantize_swiglu_backward

# 100 + 200 rows of 150 tokens pad to 128 + 256 = 384; any routing fits into 512. H 256, I 128.
SIZES = LayerSizes.of(LayerShape(150, 2, 256, 128, 2), [100, 200], torch.bfloat16)


def operand(features: int) -> int:
    """Bytes: 384 rows of codes, and of scales."""
    return 384 * features + 384 * features // 128 * 4


@pytest.mark.parametrize(
    ("work", "num_bytes"),
    [
        (floor.quantize_tokens(SIZES), 150 * 256 * 2 + 2 * operand(256)),
        (floor.swiglu(SIZES), 300 * 256 * 2 + operand(128)),
        (floor.swiglu_backward(SIZES), 300 * 128 * 2 + 300 * 256 * 2 + 2 * operand(256) + operand(128)),
        (floor.combine(SIZES), 300 * 256 * 2 + 150 * 256 * 2),
        (floor.dequantize_rows(SIZES), operand(256) + 300 * 256 * 2),
    ],
)
def test_work_by_hand(work: Work, num_bytes: int) -> None:
    assert work == Work(num_bytes)


def test_work_equals_the_tensors_where_nothing_is_padded() -> None:
    """Every token chooses both experts: 256 rows each, as many as there are padded rows in use."""
    shape = LayerShape(256, 2, 256, 128, 2)
    sizes = LayerSizes.of(shape, [256, 256], torch.float32)
    ids, _ = draw_topk(shape, TopkRouting.UNIFORM, seed=0)
    routing = Routing.from_topk(ids, 2)
    assert floor.route(sizes).bytes == ids.nbytes + sum(tensor.nbytes for tensor in routing.tensors)

    hidden, x, d_act = torch.randn(256, 256), torch.randn(512, 256).bfloat16(), torch.randn(512, 128).bfloat16()
    layout, groups = TokenLayout.SIDE_BY_SIDE, routing.groups
    capacity = groups.capacity
    used = 512 / capacity  # of what is allocated

    def nbytes(*operands: object) -> float:
        return used * sum(each.data.nbytes + each.scale.nbytes for each in operands)  # type: ignore[attr-defined]

    gathering = replace(groups, row_source=routing.row_token)
    both = quantize_rows_and_tokens(hidden, gathering, ScaleFormat.FP32, layout)
    assert floor.quantize_tokens(sizes).bytes == hidden.nbytes + nbytes(*both)
    rows, _ = quantize_swiglu(x, groups, ScaleFormat.FP32)
    assert floor.swiglu(sizes).bytes == x.nbytes + nbytes(rows)
    made = quantize_swiglu_backward(d_act, x, groups, ScaleFormat.FP32, layout=layout)
    operands = nbytes(made.d_x_rows, made.d_x_tokens, made.act_tokens)
    assert floor.swiglu_backward(sizes).bytes == d_act.nbytes + x.nbytes + operands


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_step_has_six_products(precision: Precision) -> None:
    forward, backward = floor.forward_work(SIZES, precision), floor.backward_work(SIZES, precision)
    gate_up, down = 2 * 300 * 256 * 256, 2 * 300 * 256 * 128
    assert sorted(work.flops for work in forward if work.flops) == [down, gate_up]
    assert sorted(work.flops for work in backward if work.flops) == [down, down, gate_up, gate_up]
    assert all(work.precision == precision for work in (*forward, *backward) if work.flops)


def test_fp8_takes_sixteen_kernels_and_bf16_twelve() -> None:
    fp8 = floor.forward_work(SIZES, "fp8"), floor.backward_work(SIZES, "fp8")
    bf16 = floor.forward_work(SIZES, "bf16"), floor.backward_work(SIZES, "bf16")
    assert [len(works) for works in (*fp8, *bf16)] == [7, 9, 5, 7]


def test_rows_between_kernels_are_bf16_whatever_the_tokens_are() -> None:
    wide = LayerSizes.of(LayerShape(150, 2, 256, 128, 2), [100, 200], torch.float32)
    assert floor.swiglu(wide) == floor.swiglu(SIZES)
    tokens = 150 * 256 * 2  # more bytes for those in fp32
    assert floor.combine(wide).bytes == floor.combine(SIZES).bytes + tokens
    products = [work.bytes for work in floor.forward_work(wide, "fp8") if work.flops]
    assert products == [work.bytes for work in floor.forward_work(SIZES, "fp8") if work.flops]
