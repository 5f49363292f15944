"""`swiglu_experts`: against the layer in high precision, and against the same steps unfused."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import ActivationStorage, FP8Config, ScaleFormat, WeightCache
from fp8moe.config import TOKEN_TILES
from fp8moe.gemm.emulated import Emulated
from fp8moe.operands import TokenGroups
from tests.generators import offsets
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr, worst_row_sqnr
from tests.test_grouped_mm import bf16_route, poisoned_memory

__all__ = ["bf16_route", "poisoned_memory"]  # fixtures

H, I = 256, 128  # noqa: E741
SIZES = [70, 0, 130, 1]
UNUSED = 9

Experts = Callable[..., Tensor]


def problem(
    dtype: torch.dtype = torch.bfloat16, sizes: list[int] = SIZES, weighted: bool = True, hidden_size: int = H
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`a`, `w_gate_up`, `w_down`, `offs` and row weights; all but `offs` need gradients."""
    num_rows = sum(sizes) + UNUSED
    a = torch.randn(num_rows, hidden_size).to(dtype).requires_grad_()
    w_gate_up = (torch.randn(len(sizes), 2 * I, hidden_size) * hidden_size**-0.5).to(dtype).requires_grad_()
    w_down = (torch.randn(len(sizes), hidden_size, I) * I**-0.5).to(dtype).requires_grad_()
    weights = torch.rand(num_rows).add(0.1).requires_grad_() if weighted else None
    return a, w_gate_up, w_down, offsets(sizes), weights


def in_high_precision(a: Tensor, w_gate_up: Tensor, w_down: Tensor, offs: Tensor, weights: Tensor | None) -> Tensor:
    """fp32, one expert after the other."""
    pieces, start = [], 0
    for expert, end in enumerate(offs.tolist()):
        gate, up = (a[start:end].float() @ w_gate_up[expert].float().t()).chunk(2, dim=1)
        activation = F.silu(gate) * up
        if weights is not None:
            activation = activation * weights[start:end, None].float()
        pieces.append(activation @ w_down[expert].float().t())
        start = end
    return F.pad(torch.cat(pieces), (0, 0, 0, a.shape[0] - start))


def unfused(
    a: Tensor, w_gate_up: Tensor, w_down: Tensor, offs: Tensor, weights: Tensor | None, config: FP8Config
) -> Tensor:
    """The same GEMMs, with SwiGLU in PyTorch between them."""
    gate_up = fp8moe.grouped_mm(a, w_gate_up.transpose(1, 2), offs, config=config)
    gate, up = gate_up.float().chunk(2, dim=1)
    activation = F.silu(gate) * up
    if weights is not None:
        activation = activation * weights[:, None].float()
    return fp8moe.grouped_mm(activation.to(a.dtype), w_down.transpose(1, 2), offs, config=config)


def gradients(out: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    return list(torch.autograd.grad(out, [x for x in inputs if x is not None], dout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("scale_format", ScaleFormat)
@pytest.mark.parametrize("token_tile", TOKEN_TILES)
def test_close_to_high_precision(
    dtype: torch.dtype, weighted: bool, scale_format: ScaleFormat, token_tile: int
) -> None:
    a, w_gate_up, w_down, offs, weights = problem(dtype, weighted=weighted)
    config = FP8Config(scale_format=scale_format, wgrad_token_tile=token_tile)
    out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
    expected = in_high_precision(a, w_gate_up, w_down, offs, weights)
    assert out.dtype == dtype
    used = int(offs[-1])
    assert sqnr(out, expected) >= 23
    assert worst_row_sqnr(out[:used], expected[:used]) >= 18
    assert (out[used:] == 0).all()
    inputs = (a, w_gate_up, w_down, weights)
    for x, mine, theirs in zip(
        [x for x in inputs if x is not None], gradients(out, *inputs), gradients(expected, *inputs), strict=True
    ):
        assert mine.dtype == x.dtype
        assert sqnr(mine, theirs) >= 22.5
    da, dw_gate_up, dw_down = gradients(
        fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config), a, w_gate_up, w_down
    )
    assert (da[used:] == 0).all()
    assert (dw_gate_up[1] == 0).all()
    assert (dw_down[1] == 0).all()


@pytest.mark.parametrize("hidden_size", [200, 127, 360])
@pytest.mark.parametrize("storage", ActivationStorage)
def test_hidden_sizes_that_are_no_multiples_of_128(hidden_size: int, storage: ActivationStorage) -> None:
    a, w_gate_up, w_down, offs, weights = problem(hidden_size=hidden_size)
    inputs, used = (a, w_gate_up, w_down, weights), int(offs[-1])
    expected = in_high_precision(a, w_gate_up, w_down, offs, weights)
    expected_gradients = gradients(expected, *inputs)
    w_gate, w_up = (half.contiguous() for half in w_gate_up.chunk(2, dim=1))
    for w in (w_gate_up, (w_gate, w_up)):
        config = FP8Config(activation_storage=storage)
        out = fp8moe.swiglu_experts(a, w, w_down, offs, weights, config=config)
        assert out.is_contiguous()
        assert sqnr(out, expected) >= 23
        assert (out[used:] == 0).all()
        for mine, theirs in zip(gradients(out, *inputs), expected_gradients, strict=True):
            assert mine.shape == theirs.shape
            assert sqnr(mine, theirs) >= 21.5


@pytest.mark.parametrize("hidden_size", [H, 200])
@pytest.mark.parametrize("token_tile", TOKEN_TILES)
def test_close_to_the_same_steps_unfused(token_tile: int, hidden_size: int) -> None:
    a, w_gate_up, w_down, offs, weights = problem(sizes=[70, 0, 600, 1], hidden_size=hidden_size)
    config = FP8Config(wgrad_token_tile=token_tile)
    inputs = (a, w_gate_up, w_down, weights)
    fused = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
    separate = unfused(a, w_gate_up, w_down, offs, weights, config)
    assert sqnr(fused, separate) >= 35
    for mine, theirs in zip(gradients(fused, *inputs), gradients(separate, *inputs), strict=True):
        assert sqnr(mine, theirs) >= 35


@pytest.mark.parametrize("sizes", [[0, 0], [1], [127], [128], [129], [0, 300, 0]], ids=str)
def test_group_sizes(sizes: list[int]) -> None:
    a, w_gate_up, w_down, offs, weights = problem(sizes=sizes, weighted=False)  # one weight's gradient is mostly noise
    out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights)
    expected = in_high_precision(a, w_gate_up, w_down, offs, weights)
    inputs = (a, w_gate_up, w_down, weights)
    for mine, theirs in zip([out, *gradients(out, *inputs)], [expected, *gradients(expected, *inputs)], strict=True):
        if theirs.any():
            assert sqnr(mine, theirs) >= 20
        else:
            assert not mine.any()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 3), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("storage", ActivationStorage)
@pytest.mark.parametrize("token_tile", [128, 256])
def test_frozen_inputs_change_no_other_gradient(
    frozen: tuple[int, ...], storage: ActivationStorage, token_tile: int
) -> None:
    a, w_gate_up, w_down, offs, weights = problem()
    config = FP8Config(activation_storage=storage, wgrad_token_tile=token_tile)
    inputs = [a, w_gate_up, w_down, weights]
    everything = gradients(fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config), *inputs)
    thawed = [x if index not in frozen else None for index, x in enumerate(inputs)]
    args = [x.detach() if index in frozen and x is not None else x for index, x in enumerate(inputs)]
    out = fp8moe.swiglu_experts(args[0], args[1], args[2], offs, args[3], config=config)  # type: ignore[arg-type]
    expected = [gradient for index, gradient in enumerate(everything) if index not in frozen]
    for mine, theirs in zip(gradients(out, *thawed), expected, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("frozen_down", [False, True])
def test_long_tiles_change_the_weights_gradients_alone_and_save_their_maxima(frozen_down: bool) -> None:
    a, w_gate_up, w_down, offs, weights = problem(sizes=[70, 0, 600, 1])
    w_down.requires_grad_(not frozen_down)
    inputs = (a, weights, w_gate_up, *([] if frozen_down else [w_down]))

    def saved_and_gradients(token_tile: int) -> tuple[list[Tensor], list[Tensor]]:
        config = FP8Config(wgrad_token_tile=token_tile)
        with recording_saved_tensors() as saved:
            out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
        return saved, gradients(out, *inputs)

    saved, (da, d_weights, *of_weights) = saved_and_gradients(128)
    for token_tile in (256, 512):
        long_saved, (long_da, long_d_weights, *long_of_weights) = saved_and_gradients(token_tile)
        assert_same_bits(long_da, da)
        assert_same_bits(long_d_weights, d_weights)
        for one, other in zip(long_of_weights, of_weights, strict=True):
            assert 22.5 < sqnr(one, other) < 100
        shapes = sorted(tuple(x.shape) for x in saved)
        capacity = TokenGroups.capacity_for(a.shape[0], len(offs))
        maxima = [] if frozen_down else [(capacity // 128, I)]
        assert sorted(tuple(x.shape) for x in long_saved) == sorted([*shapes, *maxima])


def test_fp8_storage_saves_half_and_loses_little() -> None:
    a, w_gate_up, w_down, offs, weights = problem(sizes=[700, 0, 900, 600])
    inputs = (a, w_gate_up, w_down, weights)
    expected = gradients(in_high_precision(a, w_gate_up, w_down, offs, weights), *inputs)

    def saved_and_gradients(storage: ActivationStorage, token_tile: int = 128) -> tuple[int, list[Tensor]]:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.shape[0] > 4:  # not the weights
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = fp8moe.swiglu_experts(
                a, w_gate_up, w_down, offs, weights,
                config=FP8Config(activation_storage=storage, wgrad_token_tile=token_tile),
            )  # fmt: skip
        return sum(sizes.values()), gradients(out, *inputs)

    bf16_bytes, _ = saved_and_gradients(ActivationStorage.BF16)
    fp8_bytes, found = saved_and_gradients(ActivationStorage.FP8)
    rows = a.shape[0]
    assert bf16_bytes - fp8_bytes > 0.7 * rows * 2 * I  # a byte an element, less what padding takes
    _, of_long_tiles = saved_and_gradients(ActivationStorage.FP8, 512)
    for mine, theirs in zip([*found, *of_long_tiles], [*expected, *expected], strict=True):
        assert sqnr(mine, theirs) >= 21.5


@pytest.mark.parametrize("token_tile", [128, 512])
def test_separate_gate_and_up_give_the_same_bits(token_tile: int) -> None:
    a, w_gate_up, w_down, offs, weights = problem()
    config = FP8Config(wgrad_token_tile=token_tile)
    joined = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
    w_gate, w_up = (half.detach().clone().requires_grad_() for half in w_gate_up.chunk(2, dim=1))
    separate = fp8moe.swiglu_experts(a, (w_gate, w_up), w_down, offs, weights, config=config)
    assert_same_bits(separate, joined)
    da, d_joined, d_down = gradients(joined, a, w_gate_up, w_down)
    for mine, theirs in zip(
        gradients(separate, a, w_gate, w_up, w_down), (da, *d_joined.chunk(2, dim=1), d_down), strict=True
    ):
        assert_same_bits(mine.contiguous(), theirs.contiguous())


@pytest.mark.parametrize("hidden_size", [H, 200, 127])
@pytest.mark.parametrize("token_tile", [128, 256])
def test_main_grads_and_weight_caches_change_nothing_but_where_gradients_go(token_tile: int, hidden_size: int) -> None:
    a, w_gate_up, w_down, offs, weights = problem(torch.float32, hidden_size=hidden_size)
    config = FP8Config(wgrad_token_tile=token_tile)
    out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
    dout = torch.randn_like(out)
    da, d_gate_up, d_down = torch.autograd.grad(out, (a, w_gate_up, w_down), dout)
    main_grads = (torch.ones_like(w_gate_up), torch.ones_like(w_down))
    caches = (WeightCache(w_gate_up), WeightCache(w_down))
    for repeat in (1, 2):
        other = fp8moe.swiglu_experts(
            a, w_gate_up, w_down, offs, weights, config=config, main_grads=main_grads, weight_caches=caches
        )
        assert_same_bits(other, out)
        other.backward(dout)
        for main_grad, gradient in zip(main_grads, (d_gate_up, d_down), strict=True):
            assert torch.allclose(main_grad, 1 + repeat * gradient, rtol=1e-5, atol=1e-5)
    assert w_gate_up.grad is None
    assert w_down.grad is None
    assert a.grad is not None
    assert torch.allclose(a.grad, 2 * da, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_stays_by_itself(value: float) -> None:
    a, w_gate_up, w_down, offs, weights = problem()
    clean = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights)
    bad = a.detach().clone()
    bad[75, 3] = value
    out = fp8moe.swiglu_experts(bad, w_gate_up, w_down, offs, weights)
    assert out[75].isnan().all()
    others = torch.arange(a.shape[0]) != 75
    assert_same_bits(out[others], clean[others])


@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_bf16_route_computes_full_groups_and_zeros_what_is_in_none(dtype: torch.dtype, weighted: bool) -> None:
    a, w_gate_up, w_down, _, weights = problem()
    a, w_gate_up, w_down = (x.detach().to(dtype).requires_grad_() for x in (a, w_gate_up, w_down))
    weights = weights if weighted else None
    inputs = [a, w_gate_up, w_down, *([] if weights is None else [weights])]
    counts, unused = [70, 0, a.shape[0] - 80, 0], 10
    offs, used = offsets(counts), a.shape[0] - unused
    full = FP8Config(assume_full=True)
    rows = None if weights is None else weights[:used]
    expected = fp8moe.swiglu_experts(a[:used], w_gate_up, w_down, offs, rows, config=full)
    out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights)
    assert_same_bits(out[:used].detach(), expected.detach())
    assert (out[used:] == 0).all()
    dout = torch.randn(out.shape).to(dtype)
    dout[used:] = torch.nan
    found = torch.autograd.grad(out, inputs, dout)
    for x, mine, other in zip(inputs, found, torch.autograd.grad(expected, inputs, dout[:used]), strict=True):
        assert mine.dtype == x.dtype
        assert mine.isfinite().all()
        assert mine.any()
        assert_same_bits(mine + 0.0, other + 0.0)
    debug = FP8Config(assume_full=True, debug=True)
    with pytest.raises(ValueError, match="the last must be"):
        fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=debug)


def test_bf16_route_mends_wrong_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.autograd.experts.backends_for", lambda *args, **kwargs: None)
    a, w_gate_up, w_down, _, weights = problem()
    w_gate, w_up = w_gate_up.detach().chunk(2, dim=1)
    wrong, mended = (torch.tensor(ends, dtype=torch.int32) for ends in ([70, -5, 300, 1], [70, 70, 210, 210]))
    for first in (w_gate_up, (w_gate, w_up)):
        out, expected = (fp8moe.swiglu_experts(a, first, w_down, offs, weights) for offs in (wrong, mended))
        assert_same_bits(out.detach(), expected.detach())
        for one, other in zip(gradients(out, a, w_down, weights), gradients(expected, a, w_down, weights), strict=True):
            assert_same_bits(one, other)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("token_tile", [128, 256])
def test_checkpointing_compiling_and_autocast(token_tile: int) -> None:
    a, w_gate_up, w_down, offs, weights = problem()
    assert weights is not None
    inputs = (a, w_gate_up, w_down, weights)

    def layer(a: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor) -> Tensor:
        config = FP8Config(wgrad_token_tile=token_tile)
        return fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)

    expected = layer(*inputs)
    again = checkpoint(layer, *inputs, use_reentrant=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    for out in (again, compiled):
        assert_same_bits(out, expected)
        for mine, theirs in zip(gradients(out, *inputs), gradients(layer(*inputs), *inputs), strict=True):
            assert_same_bits(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(a.float(), w_gate_up.float(), w_down.float(), weights).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", ActivationStorage)
def test_backward_drops_gate_and_up_before_it_needs_memory_for_their_dgrad(
    monkeypatch: pytest.MonkeyPatch, storage: ActivationStorage
) -> None:
    a, w_gate_up, w_down, offs, weights = problem()
    restored: list[weakref.ref[Tensor]] = []

    def restore(x: Tensor) -> Tensor:
        x = x.clone()  # as offloading and checkpointing make it
        if x.shape[1:] == (2 * I,) and len(x) >= len(a):
            restored.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, restore):
        config = FP8Config(activation_storage=storage)
        out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
    alive: list[int] = []
    original = Emulated.m_grouped

    def observed(*arguments: Any) -> Tensor:
        alive.append(sum(x() is not None for x in restored))
        return original(*arguments)

    monkeypatch.setattr(Emulated, "m_grouped", observed)
    out.sum().backward()
    assert len(restored) == 1
    assert alive == [1, 0]  # in the dgrad of down, and in that of gate and up
    a, w_gate_up, w_down, offs, weights = problem()
    out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights)
    (da,) = torch.autograd.grad(out.float().square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fp8moe\.swiglu_experts can be differentiated once"):
        da.float().sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"a": [1.0]}, TypeError, "a is a list"),
        ({"a": torch.zeros(5)}, ValueError, r"a has shape \(5,\)"),
        ({"a": torch.zeros(210, 128)}, ValueError, "its last dimension must be H, 256"),
        ({"w_gate_up": 3}, TypeError, "w_gate_up is a int"),
        ({"w_gate_up": torch.zeros(4, 128, 256)}, ValueError, r"w_gate_up has shape \(4, 128, 256\)"),
        ({"w_gate_up": (torch.zeros(4, 128, 256), None)}, TypeError, r"w_gate_up\[1\] \(up\) is a NoneType"),
        ({"w_down": torch.zeros(256, 128)}, ValueError, r"w_down has shape \(256, 128\)"),
        ({"w_down": torch.zeros(4, 256, 128, dtype=torch.int8)}, TypeError, "w_down has dtype torch.int8"),
        ({"offs": torch.zeros(4, dtype=torch.int64)}, TypeError, "offs has dtype torch.int64"),
        ({"row_weights": torch.zeros(3)}, ValueError, "row_weights has shape"),
        ({"row_weights": torch.zeros(210, dtype=torch.int32)}, TypeError, "row_weights has dtype"),
        ({"main_grads": None}, TypeError, "main_grads is None; it must be a pair"),
        (
            {"main_grads": (torch.zeros(4, 256, 256).bfloat16(), None)},
            TypeError,
            r"main_grads\[0\] has dtype torch.bfloat16",
        ),
        ({"main_grads": (None, torch.zeros(4, 128, 256).transpose(1, 2))}, ValueError, "must be contiguous"),
        (
            {"main_grads": (None, torch.zeros(4, 128, 256))},
            ValueError,
            r"main_grads\[1\] has shape .* that of its weight, \(4, 256, 128\)$",
        ),
        ({"weight_caches": (1, None)}, TypeError, "weight_cache is a int"),
        ({"config": "fp8"}, TypeError, "config is 'fp8'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], told: str) -> None:
    a, w_gate_up, w_down, offs, weights = problem()
    arguments: dict[str, object] = {
        "a": a, "w_gate_up": w_gate_up, "w_down": w_down, "offs": offs, "row_weights": weights,
    }  # fmt: skip
    with pytest.raises(error, match=told):
        fp8moe.swiglu_experts(**{**arguments, **change})  # type: ignore[arg-type]
