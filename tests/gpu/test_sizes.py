"""Features that are no multiple of 128, on a Hopper GPU: the emulation's results, and nothing written around them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import ActivationStorage, FP8Config, KernelPreference, ScaleFormat, WeightCache
from fp8moe.config import TOKEN_TILES
from fp8moe.devices import multiprocessors
from fp8moe.gemm.bf16 import k_grouped_add_bf16, k_grouped_bf16, m_grouped_bf16
from fp8moe.gemm.emulated import Emulated
from fp8moe.gemm.triton import TritonGemm
from fp8moe.operands import TokenLayout
from fp8moe.quantize import quantize_rows, quantize_tokens, quantize_weight_for_forward
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, offsets
from tests.gpu.support import EMULATED, lacks, no_synchronization, poison_free_memory, problem
from tests.gpu.test_backends import assert_agree
from tests.measures import assert_same_bits, sqnr
from tests.test_grouped_mm import RAGGED, fp8, in_fp32, run

TRITON = FP8Config(kernel_preference=KernelPreference.TRITON)
LACKS = lacks(KernelPreference.TRITON)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(LACKS), reason=LACKS)]

ROWS = [200, 0, 130, 513]
SIZES = [
    (200, 136),  # rows of whole vectors of 16 bytes
    (720, 720),  # a quarter of gpt-oss
    (2880, 2880),  # rows of pieces of 64
    (704, 1408),
    (1408, 704),
    (127, 129),  # odd
    (130, 8),
    (8, 131),
    (64, 257),
]
GUARD = 1024
"""Elements around an output: it still starts at a multiple of 16 bytes."""


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_products_agree_with_the_emulation(n: int, k: int, dtype: torch.dtype) -> None:
    assert_agree(TRITON, problem(ROWS, n, k, unused_rows=7, dtype=dtype))


def test_of_one_feature() -> None:
    """Here every rounding shows: the emulation rounds alike."""
    problem_ = problem(ROWS, 1, 1, unused_rows=7, dtype=torch.float32)
    for mine, expected in zip(run(fp8(TRITON), *problem_), run(fp8(EMULATED), *problem_), strict=True):
        assert sqnr(mine, expected) >= 90


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_weights_stored_transposed(n: int, k: int) -> None:
    a, w, offs, dout = problem(ROWS, n, k)
    stored = w.transpose(1, 2).contiguous().transpose(1, 2)
    for transposed, plain in zip(
        run(fp8(TRITON), a, stored, offs, dout), run(fp8(TRITON), a, w, offs, dout), strict=True
    ):
        assert sqnr(transposed, plain) >= 45


def guarded(shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> tuple[Tensor, Tensor]:
    """A tensor full of `fill`, and the memory that it is the middle of."""
    memory = torch.full((math.prod(shape) + 2 * GUARD,), 7.0, dtype=dtype, device="cuda")
    return memory[GUARD:-GUARD].view(shape).fill_(fill), memory


def assert_nothing_around_was_written(memory: Tensor) -> None:
    assert (memory[:GUARD] == 7).all()
    assert (memory[-GUARD:] == 7).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_m_grouped_writes_its_output_and_nothing_else(n: int, k: int, dtype: torch.dtype) -> None:
    from fp8moe.kernels.sm90.m_grouped import launch_m_grouped

    a, w, offs, _ = problem(ROWS, n, k, unused_rows=70)
    groups = plan_groups(offs, a.shape[0])
    rows, weight = (
        quantize_rows(a, groups, ScaleFormat.FP32),
        quantize_weight_for_forward(w, ScaleFormat.FP32),
    )
    out, memory = guarded((a.shape[0], n), dtype, torch.nan)
    launch_m_grouped(
        *rows.tensors, *weight.tensors, groups.row_expert, groups.row_source, groups.ends, groups.padded_ends, out,
        multiprocessors=multiprocessors(out.device),
    )  # fmt: skip
    assert_nothing_around_was_written(memory)
    assert (out[sum(ROWS) :] == 0).all()
    expected = Emulated().m_grouped(rows, weight, groups, torch.float32, n)
    assert sqnr(out, expected) >= (70 if dtype == torch.float32 else 45)
    assert_same_bits(out, TritonGemm().m_grouped(rows, weight, groups, dtype, n))
    if n > 100:  # a part of the features
        assert_same_bits(out[:, :100].contiguous(), TritonGemm().m_grouped(rows, weight, groups, dtype, 100))


@pytest.mark.parametrize("token_tile", [128, 256])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_wgrad_writes_its_output_and_nothing_else(n: int, k: int, token_tile: int) -> None:
    from fp8moe.kernels.sm90.wgrad import launch_wgrad

    groups = plan_groups(offsets(ROWS, "cuda"), sum(ROWS))
    poison_free_memory()
    lhs, rhs = (
        quantize_tokens(torch.randn(sum(ROWS), size, device="cuda"), groups, ScaleFormat.FP32, layout, tile)
        for layout in [TokenLayout.SIDE_BY_SIDE]
        for size, tile in ((n, 128), (k, token_tile))
    )
    # What lies past the groups is NaN, scales too: they are read behind the last feature.
    used = int(groups.padded_ends[-1])
    for operand in (lhs, rhs):
        operand.data.view(torch.uint8)[:, used:] = 0x7F
        operand.stored_scale[used // 128 :] = torch.nan
    expected = Emulated().k_grouped(lhs, rhs, groups, torch.float32)
    for dtype, accumulate in [*((dtype, False) for dtype in FLOAT_DTYPES), (torch.float32, True)]:
        out, memory = guarded((len(ROWS), n, k), dtype, 1.0 if accumulate else torch.nan)
        launch_wgrad(
            lhs.data, rhs.data, lhs.stored_scale, rhs.stored_scale, groups.padded_ends, out,
            accumulate=accumulate, multiprocessors=multiprocessors(out.device), rhs_token_tile=token_tile,
        )  # fmt: skip
        assert_nothing_around_was_written(memory)
        assert (out[1] == accumulate).all()
        assert sqnr(out - 1 if accumulate else out, expected) >= (60 if dtype == torch.float32 else 45)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "at any address"])
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_main_grad_of_any_size(n: int, k: int, stored: str, offset: int) -> None:
    a, w, offs, dout = problem(ROWS, n, k)
    w.requires_grad_()
    flat = torch.randn(w.numel() + 4, device="cuda")
    results = []
    for config in (TRITON, EMULATED):
        main_grad = flat.clone()[offset : offset + w.numel()]
        main_grad = main_grad.view(w.shape) if stored == "E,N,K" else main_grad.view(-1, k, n).transpose(1, 2)
        before = main_grad.clone()
        out = fp8moe.grouped_mm(a, w.transpose(1, 2), offs, config=config, main_grad=main_grad.transpose(1, 2))
        out.backward(dout)
        results.append(main_grad - before)
        assert_same_bits(main_grad[1], before[1])
    assert sqnr(*results) >= 45


@pytest.mark.parametrize(("n", "k"), [(200, 136), (127, 129), (720, 720)])
def test_weight_cache_of_any_size(n: int, k: int) -> None:
    a, w, offs, dout = problem(ROWS, n, k)
    a, w = a.requires_grad_(), w.requires_grad_()
    cache = WeightCache(w)
    for _ in range(3):
        out, plain = (
            fp8moe.grouped_mm(a, w.transpose(1, 2), offs, config=TRITON, weight_cache=weight_cache)
            for weight_cache in (cache, None)
        )
        assert_same_bits(out, plain)
        for mine, expected in zip(
            torch.autograd.grad(out, (a, w), dout), torch.autograd.grad(plain, (a, w), dout), strict=True
        ):
            assert_same_bits(mine, expected)
        w.data.mul_(-2)  # seen by its effect alone


@pytest.mark.parametrize(("n", "k"), [(200, 136), (127, 129), (720, 720)])
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
def test_bf16_route_takes_any_size(n: int, k: int, stored: str) -> None:
    a, w, offs, dout = problem(RAGGED, n, k, unused_rows=5)
    out, da, dw = run(in_fp32, a.float(), w.float(), offs, dout.float())
    b = w.transpose(1, 2) if stored == "E,N,K" else w.transpose(1, 2).contiguous()
    poison_free_memory()
    assert sqnr(m_grouped_bf16(a, b, offs, torch.bfloat16), out) >= 40
    assert sqnr(m_grouped_bf16(dout, b.transpose(1, 2), offs, torch.bfloat16), da) >= 40
    assert sqnr(k_grouped_bf16(dout, a, offs, torch.bfloat16), dw) >= 40
    into = torch.zeros_like(dw)
    k_grouped_add_bf16(dout, a, offs, into)
    assert sqnr(into, dw) >= 40


def test_never_synchronizes() -> None:
    for n, k in ((200, 136), (127, 129)):
        problem_ = problem(RAGGED, n, k, unused_rows=9)
        run(fp8(TRITON), *problem_)  # compile
        with no_synchronization():
            run(fp8(TRITON), *problem_)


@pytest.mark.parametrize("hidden_size", [360, 129])
@pytest.mark.parametrize("token_tile", TOKEN_TILES)
@pytest.mark.parametrize("storage", ActivationStorage)
def test_layers_of_any_hidden_size(hidden_size: int, token_tile: int, storage: ActivationStorage) -> None:
    tokens, num_experts, intermediate_size = 300, 6, 384
    hidden = torch.randn(tokens, hidden_size, device="cuda").bfloat16().requires_grad_()
    ids = torch.randint(-1, num_experts - 1, (tokens, 4), device="cuda")
    weights = torch.rand(tokens, 4, device="cuda").add(0.1).requires_grad_()
    w_gate_up, w_down = (
        (torch.randn(num_experts, *shape, device="cuda") * shape[1] ** -0.5).bfloat16().requires_grad_()
        for shape in ((2 * intermediate_size, hidden_size), (hidden_size, intermediate_size))
    )
    dout, results = torch.randn(tokens, hidden_size, device="cuda").bfloat16(), []
    for each in (TRITON, EMULATED):
        config = replace(each, wgrad_token_tile=token_tile, activation_storage=storage)
        poison_free_memory()
        out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, config=config)
        results.append([out.detach(), *torch.autograd.grad(out, (hidden, weights, w_gate_up, w_down), dout)])
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        assert sqnr(mine, expected) >= 35
