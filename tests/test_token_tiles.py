"""`FP8Config.wgrad_token_tile=None`, the default: 256 where that makes wgrad faster, else 128."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage, FP8Config, KernelPreference
from fp8moe.config import TOKEN_TILES
from fp8moe.gemm.select import token_tile_for
from tests import test_experts
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr
from tests.test_experts import I, gradients
from tests.test_grouped_mm import EMULATED, fp8, problem, run

SIZES = [300, 0, 700, 1]
DEEPGEMM, TRITON = KernelPreference.DEEPGEMM, KernelPreference.TRITON


@pytest.mark.parametrize(
    ("wgrad", "on_the_right", "expected"),
    [
        (TRITON, True, 256),
        (TRITON, False, 128),
        (KernelPreference.EMULATED, True, 256),  # what AUTO computes on Hopper
        (KernelPreference.EMULATED, False, 128),
        (DEEPGEMM, True, 128),
        (DEEPGEMM, False, 128),
    ],
)
def test_the_default_is_long_where_that_is_faster(wgrad: KernelPreference, on_the_right: bool, expected: int) -> None:
    assert token_tile_for(FP8Config(), wgrad, on_the_right=on_the_right) == expected


@pytest.mark.parametrize("tile", TOKEN_TILES)
@pytest.mark.parametrize("wgrad", [TRITON, DEEPGEMM, KernelPreference.EMULATED])
def test_a_named_tile_is_taken_everywhere(wgrad: KernelPreference, tile: int) -> None:
    for on_the_right in (True, False):
        assert token_tile_for(FP8Config(wgrad_token_tile=tile), wgrad, on_the_right=on_the_right) == tile


def named(tile: int, **options: object) -> FP8Config:
    return replace(EMULATED, wgrad_token_tile=tile, **options)  # type: ignore[arg-type]


def stored_transposed(w: Tensor) -> Tensor:
    """The same weight, stored `(E, K, N)`."""
    return w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def part_of_more(w: Tensor) -> Tensor:
    """The same weight, contiguous in neither order."""
    return torch.cat([w.detach(), w.detach()], 2)[..., : w.shape[2]].requires_grad_()


@pytest.mark.parametrize(("store", "tile"), [(Tensor.detach, 256), (part_of_more, 256), (stored_transposed, 128)])
def test_of_a_product_the_layout_of_the_weight_decides(store, tile: int) -> None:  # type: ignore[no-untyped-def]
    a, w, offs, dout = problem(SIZES)
    w = store(w).requires_grad_()

    def gradient_of_w(config: FP8Config) -> Tensor:
        return torch.autograd.grad(fp8(config)(a, w, offs), w, dout)[0]

    assert_same_bits(gradient_of_w(EMULATED), gradient_of_w(named(tile)))
    assert sqnr(gradient_of_w(named(256)), gradient_of_w(named(128))) < 100


@pytest.mark.parametrize(("stored", "tile"), [("E,N,K", 256), ("E,K,N", 128)])
def test_of_a_product_with_a_main_grad_its_layout_decides(stored: str, tile: int) -> None:
    a, w, offs, dout = problem(SIZES)

    def sums(config: FP8Config) -> Tensor:
        zeros = torch.zeros(w.shape)
        main_grad = (zeros if stored == "E,N,K" else stored_transposed(zeros).detach()).transpose(1, 2)
        fp8moe.grouped_mm(a, w.transpose(1, 2), offs, config=config, main_grad=main_grad).backward(dout)
        return main_grad

    assert_same_bits(sums(EMULATED), sums(named(tile)))
    assert sqnr(sums(named(256)), sums(named(128))) < 100


def test_outputs_and_other_gradients_do_not_depend_on_it() -> None:
    a, w, offs, dout = problem(SIZES)
    for mine, theirs in zip(run(fp8(), a, w, offs, dout)[:2], run(fp8(named(128)), a, w, offs, dout)[:2], strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("storage", ActivationStorage)
@pytest.mark.parametrize("transposed_gate_up", [False, True])
@pytest.mark.parametrize("transposed_down", [False, True])
def test_of_a_layer_each_weight_decides_for_itself(
    transposed_gate_up: bool, transposed_down: bool, storage: ActivationStorage
) -> None:
    a, w_gate_up, w_down, offs, weights = test_experts.problem(sizes=SIZES)
    if transposed_gate_up:
        w_gate_up = stored_transposed(w_gate_up)
    if transposed_down:
        w_down = stored_transposed(w_down)

    def of(config: FP8Config) -> tuple[list[Tensor], Tensor, Tensor]:
        with recording_saved_tensors() as saved:
            out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config)
        d_gate_up, d_down = gradients(out, w_gate_up, w_down)
        return saved, d_gate_up, d_down

    default, short, long = (
        of(replace(EMULATED, activation_storage=storage)),
        *(of(named(tile, activation_storage=storage)) for tile in (128, 256)),
    )
    _, d_gate_up, d_down = default
    assert_same_bits(d_gate_up, (short if transposed_gate_up else long)[1])
    assert_same_bits(d_down, (short if transposed_down else long)[2])
    for one, other in zip(short[1:], long[1:], strict=True):
        assert 22 < sqnr(one, other) < 100
    assert len(default[0]) == len((short if transposed_down else long)[0])  # maxima of the activation's tiles, or none


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_pair_is_made_as_one(transposed: bool) -> None:
    """`(E, 2I, H)` however the two are stored, so long tiles make it faster."""
    a, w_gate_up, w_down, offs, weights = test_experts.problem(sizes=SIZES)
    pair = tuple(half.detach().clone().requires_grad_() for half in w_gate_up.chunk(2, dim=1))
    if transposed:
        pair = tuple(map(stored_transposed, pair))
    w_gate, w_up = pair

    def of(config: FP8Config) -> list[Tensor]:
        out = fp8moe.swiglu_experts(a, (w_gate, w_up), w_down, offs, weights, config=config)
        return gradients(out, w_gate, w_up, w_down)

    for mine, theirs in zip(of(EMULATED), of(named(256)), strict=True):
        assert mine.shape[1:] in ((I, a.shape[1]), (a.shape[1], I))
        assert_same_bits(mine, theirs)


def test_sums_in_main_grads_of_a_layer_are_made_with_long_tiles() -> None:
    """They are `(E, N, K)`, also of weights that are stored the other way."""
    a, w_gate_up, w_down, offs, weights = test_experts.problem(sizes=SIZES)
    w_gate_up, w_down = stored_transposed(w_gate_up), stored_transposed(w_down)

    def of(config: FP8Config) -> tuple[Tensor, Tensor]:
        main_grads = torch.zeros(w_gate_up.shape), torch.zeros(w_down.shape)
        out = fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights, config=config, main_grads=main_grads)
        out.backward(torch.ones_like(out))
        return main_grads

    for mine, theirs, short in zip(of(EMULATED), of(named(256)), of(named(128)), strict=True):
        assert_same_bits(mine, theirs)
        assert sqnr(mine, short) < 100


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_code_takes_the_same_tiles(transposed: bool) -> None:
    a, w_gate_up, w_down, offs, weights = test_experts.problem(sizes=SIZES)
    if transposed:
        w_gate_up, w_down = stored_transposed(w_gate_up), stored_transposed(w_down)

    def layer(a: Tensor, w_gate_up: Tensor, w_down: Tensor, offs: Tensor, weights: Tensor | None) -> Tensor:
        return fp8moe.swiglu_experts(a, w_gate_up, w_down, offs, weights)

    results = [
        gradients(op(a, w_gate_up, w_down, offs, weights), w_gate_up, w_down)
        for op in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)
    ]
    for compiled, eager in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            EMULATED,
            "tiles of 256 tokens of the activations where the gradient is made (E, N, K):\n"
            "           weights stored so, pairs, main_grads; else of 128\n",
        ),
        (named(128), "tiles of 128 tokens of the activations\n"),
        (named(512), "tiles of 512 tokens of the activations\n"),
    ],
)
def test_explain_tells_the_tiles(config: FP8Config, line: str) -> None:
    assert f"           {line}" in str(fp8moe.explain("cpu", config))
