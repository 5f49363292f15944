"""`FP8Config.keep_quantized_weights`: the same bits, one quantization of each weight instead of two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import FP8Config
from tests.generators import offsets
from tests.measures import assert_same_bits, recording_saved_tensors

H, I = 256, 128  # noqa: E741
SIZES = [70, 0, 130]
OFFS = offsets(SIZES)
KEEPING, PLAIN = FP8Config(keep_quantized_weights=True), FP8Config()

Op = Callable[..., Tensor]


class CountingQuantizations(TorchDispatchMode):
    """How often weights are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.fp8moe.quantize_weight.default
        return func(*args, **(kwargs or {}))


def product(config: FP8Config, a: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return fp8moe.grouped_mm(a, w_down, OFFS, config=config)


def layer(config: FP8Config, a: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return fp8moe.swiglu_experts(a, torch.cat([w_gate, w_up], 1), w_down, OFFS, config=config)


def layer_of_a_pair(config: FP8Config, a: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return fp8moe.swiglu_experts(a, (w_gate, w_up), w_down, OFFS, config=config)


OPS = {"product": (product, 1), "layer": (layer, 2), "layer of a pair": (layer_of_a_pair, 2)}
"""With how many weights each has."""


def inputs() -> tuple[Tensor, ...]:
    e = len(SIZES)
    shapes = ((sum(SIZES), H), (e, I, H), (e, I, H), (e, H, I))
    return tuple((torch.randn(shape) * shape[-1] ** -0.5).bfloat16().requires_grad_() for shape in shapes)


def results(call: Callable[[], Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The output, and the gradients of all that were used."""
    out = call()
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    gradients = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    return [out.detach(), *gradients]


def assert_equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert other.count_nonzero() > 0
            assert_same_bits(one, other)


@pytest.mark.parametrize("name", OPS)
def test_the_bits_are_the_same_and_each_weight_is_quantized_once(name: str) -> None:
    (op, num_weights), tensors = OPS[name], inputs()
    with CountingQuantizations() as plain:
        expected = results(lambda: op(PLAIN, *tensors), tensors)
    with CountingQuantizations() as keeping:
        actual = results(lambda: op(KEEPING, *tensors), tensors)
    assert_equal(actual, expected)
    assert (keeping.count, plain.count) == (num_weights, 2 * num_weights)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(name: str, reentrant: bool) -> None:
    (op, num_weights), tensors = OPS[name], inputs()
    expected = results(lambda: op(PLAIN, *tensors), tensors)
    with CountingQuantizations() as keeping:
        actual = results(lambda: checkpoint(op, KEEPING, *tensors, use_reentrant=reentrant), tensors)
    assert_equal(actual, expected)
    assert keeping.count == 2 * num_weights  # in forward, and once more as it is repeated


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_kept_for_a_dgrad_that_never_comes(name: str) -> None:
    op, _ = OPS[name]
    a, *weights = inputs()
    kept = []
    for wanted in (False, True):
        with recording_saved_tensors() as saved:
            op(KEEPING, a.detach().requires_grad_(wanted), *(w.detach() for w in weights))
        kept.append(sum(x.numel() for x in saved if x.dtype is torch.float8_e4m3fn and x.dim() == 3))
    assert kept == [0, sum(w.numel() for w in (weights[2:] if op is product else weights))]


def test_without_gradients_only_forward_is_prepared() -> None:
    tensors = inputs()
    with torch.no_grad(), recording_saved_tensors() as saved:
        assert layer(KEEPING, *tensors).count_nonzero() > 0
    assert not saved


@pytest.mark.parametrize("name", OPS)
def test_backward_uses_the_weight_that_forward_used(name: str) -> None:
    (op, _), tensors = OPS[name], inputs()
    expected = torch.autograd.grad(op(PLAIN, *tensors).sum(), tensors[0])
    out = op(KEEPING, *tensors).sum()
    with torch.no_grad():
        for w in tensors[1:]:
            w.zero_()
    assert_same_bits(*torch.autograd.grad(out, tensors[0]), *expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch does, as it traces
@pytest.mark.parametrize("name", OPS)
def test_compiled(name: str) -> None:
    (op, _), tensors = OPS[name], inputs()
    expected = results(lambda: op(PLAIN, *tensors), tensors)
    compiled = torch.compile(lambda *tensors: op(KEEPING, *tensors), backend="aot_eager", fullgraph=True)
    assert_equal(results(lambda: compiled(*tensors), tensors), expected)
