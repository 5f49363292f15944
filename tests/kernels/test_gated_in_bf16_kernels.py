"""The kernels make the activation and its gradients as their definition in PyTorch does, and touch no unused row."""

import pytest
import torch
from torch import Tensor

from fp8moe.gate import Gate
from fp8moe.kernels.gated_in_bf16 import launch_gated, launch_gated_backward
from fp8moe.quantize.gated_in_bf16 import gated_by_definition, gradients_by_definition
from tests.kernels.test_spread_kernel import choices
from tests.measures import assert_same_bits, sqnr

GATES = [
    Gate.swiglu(),
    Gate.clamped_swiglu(1.5, alpha=1.702, up_offset=1.0),
    Gate.post_clamped_swiglu(1.0),
    Gate.geglu_tanh(),
    Gate.relu_squared(),
]
gates = pytest.mark.parametrize("gate", GATES, ids=[gate.kind.value for gate in GATES])


def made_by_kernels(
    parts: list[Tensor], d_act: Tensor, weights: Tensor | None, choice_row: Tensor | None, gate: Gate, interleaved: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The activation, the gradients of the parts, and of the weights: what the kernels leave is NaN."""
    act = torch.full_like(d_act, torch.nan)
    launch_gated(parts, weights, choice_row, act, gate.code, interleaved)
    d_parts = [torch.full_like(part, torch.nan) for part in parts]
    d_weights = None if weights is None else torch.full_like(weights, torch.nan, dtype=torch.float32)
    launch_gated_backward(d_act, parts, weights, choice_row, d_parts, d_weights, gate.code, interleaved)
    return act, d_parts, d_weights


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Of one dtype: exponentials differ in their last bit, which rounding to BF16 makes one in a thousand of values."""
    assert actual.dtype == expected.dtype
    assert (actual.isnan() == expected.isnan()).all()
    assert sqnr(actual, expected) >= 55


@gates
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize("num_features", [1, 72, 1100])
def test_rows(device: torch.device, gate: Gate, num_rows: int, num_features: int) -> None:
    for interleaved in (False, True)[: gate.projections]:
        parts = [torch.randn(num_rows, gate.projections * num_features).bfloat16().to(device)]
        d_act = torch.randn(num_rows, num_features).bfloat16().to(device)
        act, (d_both,), _ = made_by_kernels(parts, d_act, None, None, gate, interleaved)
        assert_near(act, gated_by_definition(parts, None, None, gate.code, interleaved))
        (expected,) = gradients_by_definition(d_act, parts, None, None, gate.code, interleaved, zero_unused=False)
        assert_near(d_both, expected)


@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("skipped", [0.0, 0.3, 1.0])
def test_choices(device: torch.device, gate: Gate, dtype: torch.dtype, skipped: float) -> None:
    num_features, choice_row = 200, choices(40, 3, skipped, seed=1).to(device)
    used = choice_row[choice_row >= 0].long()
    unused = torch.ones(120, dtype=torch.bool, device=device).index_fill(0, used, False)
    parts = [torch.randn(120, num_features, device=device).to(dtype) for _ in range(gate.projections)]
    weights = torch.rand(40, 3, device=device) + 0.1
    d_act = torch.randn(120, num_features, device=device).bfloat16()
    for x in (*parts, d_act):
        x[unused] = torch.inf  # whatever lies there
    act, d_parts, d_weights = made_by_kernels(parts, d_act, weights, choice_row, gate, interleaved=False)
    assert d_weights is not None
    assert act[unused].isnan().all()
    assert all(part[unused].isnan().all() for part in d_parts)
    assert (d_weights[choice_row < 0] == 0).all()
    if len(used) == 0:
        return
    assert_near(act[used], gated_by_definition(parts, weights, choice_row, gate.code, False)[used])
    *expected, of_weights = gradients_by_definition(d_act, parts, weights, choice_row, gate.code, False, False)
    for mine, other in zip(d_parts, expected, strict=True):
        assert_near(mine[used], other[used])
    assert_near(d_weights, of_weights)


def test_no_rows(device: torch.device) -> None:
    parts, d_act = [torch.randn(0, 64, device=device)], torch.randn(0, 32, device=device).bfloat16()
    act, (d_both,), _ = made_by_kernels(parts, d_act, None, None, Gate.swiglu(), interleaved=False)
    assert act.shape == (0, 32)
    assert d_both.shape == (0, 64)


def test_a_bad_row_stays_by_itself(device: torch.device) -> None:
    parts, d_act = [torch.randn(9, 64, device=device).bfloat16()], torch.randn(9, 32, device=device).bfloat16()
    weights = torch.rand(9, device=device)
    clean = made_by_kernels(parts, d_act, weights, None, Gate.swiglu(), interleaved=False)
    parts[0][4, 7] = torch.nan
    act, (d_both,), d_weights = made_by_kernels(parts, d_act, weights, None, Gate.swiglu(), interleaved=False)
    assert act[4, 7].isnan()
    assert d_weights is not None
    assert d_weights[4].isnan()
    others = [row for row in range(9) if row != 4]
    assert clean[2] is not None
    for mine, before in ((act, clean[0]), (d_both, clean[1][0]), (d_weights, clean[2])):
        assert_same_bits(mine[others], before[others])


@pytest.mark.gpu
@pytest.mark.large
def test_more_elements_than_int32() -> None:
    num_rows, num_features = 1 << 21, 1024
    both = torch.randn(num_rows, 2 * num_features, dtype=torch.bfloat16, device="cuda")  # 4.3e9 elements
    d_act = torch.randn(num_rows, num_features, dtype=torch.bfloat16, device="cuda")
    act, (d_both,), _ = made_by_kernels([both], d_act, None, None, Gate.swiglu(), interleaved=False)
    for part in (slice(0, 100), slice(num_rows - 100, None)):
        assert_near(act[part], gated_by_definition([both[part]], None, None, Gate.swiglu().code, False))
        (expected,) = gradients_by_definition(d_act[part], [both[part]], None, None, Gate.swiglu().code, False, False)
        assert_near(d_both[part], expected)
