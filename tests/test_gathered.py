"""What is gathered is an operand, and the other operand is made of it, in the layout that GEMMs are promised."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.operands import WeightOperand
from fp8moe.quantize import quantize_weight_for_both
from fp8moe.quantize.gathered import GatheredCodes, GatheredPair, GatheredWeight, WeightForm
from fp8moe.quantize.weight_source import source_of
from fp8moe.quantize.weights import Split
from tests.measures import assert_same_bits

FORM = WeightForm(ScaleFormat.POW2)
ANYTHING = torch.empty(0)


def gathered(w: Tensor, held_for_dgrad: bool, form: WeightForm = FORM) -> GatheredCodes:
    source = GatheredCodes(form)
    operands = quantize_weight_for_both(w, form.scale_format, form.split)
    source.hold(operands[held_for_dgrad].data, operands[0].scale, for_dgrad=held_for_dgrad)
    return source


def assert_equal(actual: WeightOperand, expected: WeightOperand) -> None:
    assert_same_bits(actual.data, expected.data)
    assert_same_bits(actual.scale, expected.scale)
    assert actual.data.stride() == expected.data.stride()
    assert actual.scale.stride() == expected.scale.stride()


@pytest.mark.parametrize("held_for_dgrad", [False, True])
@pytest.mark.parametrize("for_dgrad", [False, True])
def test_either_operand_is_made_of_what_is_held(held_for_dgrad: bool, for_dgrad: bool) -> None:
    gate, up = torch.randn(3, 256, 384), torch.randn(3, 256, 384)
    sources = [gathered(w, held_for_dgrad) for w in (gate, up)]
    options: dict[str, Any] = {"for_dgrad": for_dgrad, "split": Split.WHOLE}
    expected = quantize_weight_for_both(gate, FORM.scale_format)[for_dgrad]
    assert_equal(sources[0].operand(ANYTHING, ScaleFormat.POW2, **options), expected)
    pair = GatheredPair(sources)
    assert source_of(pair.handle)[0] is pair
    expected = quantize_weight_for_both([gate, up], FORM.scale_format)[for_dgrad]
    assert_equal(pair.operand(ANYTHING, ScaleFormat.POW2, **options), expected)


@pytest.mark.parametrize("split", [Split.HALVES, Split.INTERLEAVED])
def test_parts_are_padded_each(split: Split) -> None:
    w = torch.randn(2, 144, 200)
    source = gathered(w, False, WeightForm(ScaleFormat.FP32, split))
    for for_dgrad in (False, True):
        expected = quantize_weight_for_both(w, ScaleFormat.FP32, split)[for_dgrad]
        assert_equal(source.operand(ANYTHING, ScaleFormat.FP32, for_dgrad=for_dgrad, split=split), expected)


def test_memory_that_was_freed_is_an_error() -> None:
    source = GatheredCodes(FORM)
    with pytest.raises(RuntimeError, match="while FSDP has it sharded"):
        source.operand(ANYTHING, ScaleFormat.POW2, for_dgrad=False)
    codes = torch.zeros(1, 128, 128, dtype=torch.uint8)
    source.hold(codes.view(torch.float8_e4m3fn), torch.ones(1, 1, 1), for_dgrad=False)
    source.operand(ANYTHING, ScaleFormat.POW2, for_dgrad=False)
    codes.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"call unshard\(\) first"):
        source.operand(ANYTHING, ScaleFormat.POW2, for_dgrad=False)


def test_a_gathered_weight_goes_where_its_source_goes() -> None:
    source = gathered(torch.randn(1, 128, 256), False)
    w = GatheredWeight(
        torch.empty(1), source.handle, None, (1, 128, 256), (128 * 256, 256, 1), torch.bfloat16, True, (source,)
    )
    number = int(source.handle[0])
    del source
    view: Any = w.transpose(-1, -2)
    assert type(view) is type(view.mT) is GatheredWeight
    assert (view.shape, view.dtype) == ((1, 256, 128), torch.bfloat16)
    assert (view.is_oriented, view.mT.is_oriented) == (False, True)
    del w
    assert int(view.handle[0]) == number
    assert isinstance(source_of(view.handle)[0], GatheredCodes)
