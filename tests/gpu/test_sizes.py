"""Features that are no multiple of 128, on a Hopper GPU: the emulation's results, and nothing written around them."""

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
from fp8moe.operands import TokenGroups, TokenLayout, TokenOperand
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

# (N, K): rows that TMA can write and others, even and odd, whole pieces of 64 rows and others, whole blocks on a side.
LARGE = [
    (200, 136), (720, 720), (127, 129), (130, 250), (704, 200), (704, 256), (128, 200), (1408, 130), (136, 1408),
    (128, 333), (333, 128),
]  # fmt: skip
SMALL = [(2, 2), (2, 130), (130, 3), (8, 360), (63, 7)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("n", "k"), LARGE)
def test_agrees_with_the_emulation(n: int, k: int, dtype: torch.dtype) -> None:
    assert_agree(TRITON, problem([*RAGGED, 700], n, k, unused_rows=7, dtype=dtype))


@pytest.mark.parametrize("token_tile", TOKEN_TILES[1:])
@pytest.mark.parametrize(("n", "k"), LARGE)
def test_long_token_tiles(n: int, k: int, token_tile: int) -> None:
    assert_agree(replace(TRITON, wgrad_token_tile=token_tile), problem([300, 0, 129, 1000, 1], n, k))


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_few_features(n: int, k: int) -> None:
    """Sums of single elements may cancel, so no row is looked at by itself."""
    problem_ = problem(RAGGED, n, k, unused_rows=7, dtype=torch.float32)
    poison_free_memory()
    for mine, expected in zip(run(fp8(TRITON), *problem_), run(fp8(EMULATED), *problem_), strict=True):
        assert mine.shape == expected.shape
        assert sqnr(mine, expected) >= 45


def in_poisoned_memory(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous tensor of NaN, where TMA can write, and what lies around it: 64 K elements on either side."""
    around = 1 << 16
    memory = torch.full((2 * around + torch.Size(shape).numel(),), torch.nan, dtype=dtype, device="cuda")
    return memory[around:-around].view(shape), memory


def assert_nothing_around(inside: Tensor, memory: Tensor) -> None:
    around = (memory.numel() - inside.numel()) // 2
    assert memory[:around].isnan().all()
    assert memory[-around:].isnan().all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("n", "k"), LARGE + SMALL)
def test_m_grouped_writes_its_output_and_nothing_else(n: int, k: int, dtype: torch.dtype) -> None:
    from fp8moe.kernels.sm90.m_grouped import launch_m_grouped

    a, w, offs, _ = problem(RAGGED, n, k, unused_rows=3)
    groups = plan_groups(offs, a.shape[0])
    lhs = quantize_rows(a, groups, ScaleFormat.FP32)
    rhs = quantize_weight_for_forward(w, ScaleFormat.FP32)
    out, memory = in_poisoned_memory((a.shape[0], n), dtype)
    launch_m_grouped(
        *lhs.tensors, *rhs.tensors, groups.row_expert, groups.row_source, groups.ends, groups.padded_ends, out,
        multiprocessors=multiprocessors(out.device),
    )  # fmt: skip
    assert_nothing_around(out, memory)
    assert sqnr(out, Emulated().m_grouped(lhs, rhs, groups, torch.float32, n)) >= 40
    assert (out[sum(RAGGED) :] == 0).all()
    if n > 100:  # a part of the features
        assert_same_bits(out[:, :100].contiguous(), TritonGemm().m_grouped(lhs, rhs, groups, dtype, 100))


def token_operands(n: int, k: int, token_tile: int) -> tuple[TokenOperand, TokenOperand, TokenGroups]:
    """Of output gradients `(M, N)` and activations `(M, K)`; NaN past the groups, whose scales are read past the last
    feature."""
    a, _, offs, dout = problem(RAGGED, n, k)
    groups = plan_groups(offs, a.shape[0])
    lhs, rhs = (
        quantize_tokens(x, groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE, tile)
        for x, tile in ((dout, 128), (a, token_tile))
    )
    used = int(groups.padded_ends[-1])
    for operand in (lhs, rhs):
        operand.data.view(torch.uint8)[:, used:] = 0x7F
        operand.stored_scale[used // 128 :] = torch.nan
    return lhs, rhs, groups


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("token_tile", [128, 256])
@pytest.mark.parametrize(("n", "k"), LARGE + SMALL)
def test_wgrad_writes_its_output_and_nothing_else(n: int, k: int, token_tile: int, dtype: torch.dtype) -> None:
    from fp8moe.kernels.sm90.wgrad import launch_wgrad

    lhs, rhs, groups = token_operands(n, k, token_tile)
    out, memory = in_poisoned_memory((len(RAGGED), n, k), dtype)
    launch_wgrad(
        lhs.data, rhs.data, lhs.stored_scale, rhs.stored_scale, groups.padded_ends, out,
        accumulate=False, multiprocessors=multiprocessors(out.device), rhs_token_tile=token_tile,
    )  # fmt: skip
    assert_nothing_around(out, memory)
    assert sqnr(out, Emulated().k_grouped(lhs, rhs, groups, torch.float32)) >= 40
    assert (out[1] == 0).all()


@pytest.mark.parametrize("token_tile", [128, 256])
@pytest.mark.parametrize(("n", "k"), LARGE + SMALL)
def test_wgrad_adds_to_its_output_and_to_nothing_else(n: int, k: int, token_tile: int) -> None:
    lhs, rhs, groups = token_operands(n, k, token_tile)
    product = Emulated().k_grouped(lhs, rhs, groups, torch.float32)
    sums = []
    for _ in range(2):
        into, memory = in_poisoned_memory((len(RAGGED), n, k), torch.float32)
        into.copy_(torch.arange(into.numel(), device="cuda").remainder(7).view_as(into))
        before = into.clone()
        TritonGemm().k_grouped_add(lhs, rhs, groups, into)
        assert_nothing_around(into, memory)
        assert_same_bits(into[1], before[1])
        assert sqnr(into - before, product) >= 40
        sums.append(into)
    assert_same_bits(*sums)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "at any address"])
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
@pytest.mark.parametrize(("n", "k"), LARGE)
def test_main_grad(n: int, k: int, stored: str, offset: int) -> None:
    a, w, offs, dout = problem(RAGGED, n, k)
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


def test_scales_of_nan_stay_with_their_own_feature() -> None:
    """A tile of wgrad that reaches past the features reads the scales of the next tokens."""
    lhs, rhs, groups = token_operands(127, 129, 128)
    for operand, feature in ((lhs, 0), (lhs, 126), (rhs, 3), (rhs, 128)):
        operand.stored_scale[:, feature] = torch.nan
    is_nan = TritonGemm().k_grouped(lhs, rhs, groups, torch.float32).isnan()
    expected = torch.zeros_like(is_nan)
    expected[:, [0, 126]] = True
    expected[:, :, [3, 128]] = True
    expected[1] = False  # an expert without tokens
    assert torch.equal(is_nan, expected)


@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N", "interleaved", "part of more"])
def test_weights_of_any_layout_with_and_without_a_cache(stored: str) -> None:
    a, w, offs, dout = problem(RAGGED, 200, 130)
    weight = {
        "E,N,K": w,
        "E,K,N": w.transpose(1, 2).contiguous().transpose(1, 2),
        "interleaved": w.repeat_interleave(2, 1)[:, 1::2],
        "part of more": w.repeat(1, 1, 2)[:, :, :130],
    }[stored]
    cache = WeightCache(weight)

    def with_cache(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a, weight.transpose(-2, -1), offs, config=TRITON, weight_cache=cache)

    out, da, _ = run(fp8(TRITON), a, w, offs, dout)
    for op in (fp8(TRITON), with_cache, with_cache):
        x = a.detach().requires_grad_()
        product = op(x, weight, offs)
        assert_same_bits(product, out)
        assert_same_bits(torch.autograd.grad(product, x, dout)[0], da)


@pytest.mark.parametrize(("n", "k"), [(200, 136), (127, 129)])
def test_never_synchronizes_and_repeats(n: int, k: int) -> None:
    problem_ = problem(RAGGED, n, k, unused_rows=9)
    first = run(fp8(TRITON), *problem_)  # compile
    poison_free_memory()
    with no_synchronization():
        again = run(fp8(TRITON), *problem_)
    for one, other in zip(first, again, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("token_tile", [128, 512])
@pytest.mark.parametrize("storage", ActivationStorage)
@pytest.mark.parametrize("hidden_size", [200, 333])
def test_layer(hidden_size: int, token_tile: int, storage: ActivationStorage) -> None:
    ids = torch.randint(-1, 5, (300, 3), device="cuda")
    scales = {"hidden": 1.0, "w_gate_up": hidden_size**-0.5, "w_down": 256**-0.5}
    shapes = {"hidden": (300, hidden_size), "w_gate_up": (6, 512, hidden_size), "w_down": (6, hidden_size, 256)}
    hidden, w_gate_up, w_down = (
        (torch.randn(shape, device="cuda") * scales[name]).bfloat16().requires_grad_() for name, shape in shapes.items()
    )
    weights = torch.rand(300, 3, device="cuda").requires_grad_()
    dout = torch.randn(300, hidden_size, device="cuda").bfloat16()
    results = []
    for config in (TRITON, EMULATED):
        poison_free_memory()
        config = replace(config, wgrad_token_tile=token_tile, activation_storage=storage)
        out = fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, config=config)
        results.append((out.detach(), *torch.autograd.grad(out, (hidden, weights, w_gate_up, w_down), dout)))
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        assert sqnr(mine, expected) >= 35


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("n", "k"), LARGE + SMALL)
def test_bf16_route(n: int, k: int, dtype: torch.dtype) -> None:
    a, w, offs, dout = problem(RAGGED, n, k, unused_rows=3, dtype=dtype)
    a_fp32, w_fp32, dout_fp32 = (x.bfloat16().float() for x in (a, w, dout))
    out, da, dw = run(in_fp32, a_fp32, w_fp32, offs, dout_fp32)
    used = slice(sum(RAGGED))
    for stored in (w.transpose(1, 2), w.transpose(1, 2).contiguous()):
        product = m_grouped_bf16(a, stored, offs, torch.float32)
        assert product.is_contiguous()
        assert sqnr(product, out) >= 45
    assert sqnr(m_grouped_bf16(dout, w, offs, torch.float32), da) >= 45
    assert sqnr(k_grouped_bf16(dout[used], a[used], offs, torch.float32), dw) >= 45
    into = torch.zeros_like(dw)
    k_grouped_add_bf16(dout, a, offs, into)
    assert sqnr(into, dw) >= 45


def test_offsets_are_those_of_the_device() -> None:
    """Whichever expert has the rows, its own padded weight is taken."""
    a, w, _, _ = problem([400, 0, 0], 136, 200)
    for expert in range(3):
        sizes = [400 if other == expert else 0 for other in range(3)]
        out = fp8(TRITON)(a, w, offsets(sizes, "cuda"))
        assert_same_bits(out, fp8(TRITON)(a, w[[expert]], offsets([400], "cuda")))
