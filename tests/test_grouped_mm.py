"""`fp8moe.grouped_mm` as its users see it, on the CPU (emulated FP8)."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import FP8Config, KernelPreference, ScaleFormat
from fp8moe.config import TOKEN_TILES
from fp8moe.gemm.bf16 import k_grouped_bf16, m_grouped_bf16
from fp8moe.gemm.select import BACKENDS
from fp8moe.operands import BLOCK, TokenGroups, TokenLayout
from fp8moe.quantize import reference
from fp8moe.rows.groups import plan_groups
from tests.generators import FLOAT_DTYPES, SIZES, VALUE_KINDS, exact_values, group_sizes, offsets, values
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr, worst_row_sqnr

EMULATED = FP8Config(kernel_preference=KernelPreference.EMULATED)
RAGGED = [200, 0, 131, 1, 168]  # 500 rows
formats = pytest.mark.parametrize("scale_format", ScaleFormat)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler on a CPU"
)

GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]


def problem(
    sizes: list[int], k: int = 256, n: int = 384, dtype: torch.dtype = torch.bfloat16, unused_rows: int = 0,
    draw: Callable[..., Tensor] = torch.randn,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Activation `(M, K)`, weight `(E, N, K)`, offsets and output gradient `(M, N)`.

    With `draw=exact_values` products have the same bits in whatever layout they are computed.
    """
    num_tokens = sum(sizes) + unused_rows
    a = draw(num_tokens, k).to(dtype).requires_grad_()
    w = (draw(len(sizes), n, k) * k**-0.5).to(dtype).requires_grad_()
    return a, w, offsets(sizes), draw(num_tokens, n).to(dtype)


def run(op: GroupedMM, a: Tensor, w: Tensor, offs: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of `a` and of `w`, of `op(a, w, offs)`; `a` and `w` are left alone."""
    a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
    out = op(a, w, offs)
    out.backward(dout)
    assert a.grad is not None
    assert w.grad is not None
    return out.detach(), a.grad, w.grad


def fp8(config: FP8Config = EMULATED) -> GroupedMM:
    return lambda a, w, offs: fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=config)


def bf16(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(a, w.transpose(-2, -1), offs=offs)


@formats
@pytest.mark.parametrize("sizes", [[128, 256, 128], RAGGED, [500], [1, 1, 498]], ids=str)
def test_close_to_bf16(scale_format: ScaleFormat, sizes: list[int]) -> None:
    a, w, offs, dout = problem(sizes)
    config = FP8Config(kernel_preference=KernelPreference.EMULATED, scale_format=scale_format)
    for actual, expected, decibels in zip(
        run(fp8(config), a, w, offs, dout), run(bf16, a, w, offs, dout), (27, 26, 26), strict=True
    ):
        assert actual.dtype == torch.bfloat16
        assert sqnr(actual, expected) >= decibels
        assert worst_row_sqnr(actual, expected) >= decibels - 5  # one row of 256 or more elements, by chance


def test_small_rows_are_as_exact_as_large_ones() -> None:
    """One scale for the whole tensor would pass the test above and fail this."""
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    magnitudes = torch.logspace(-15, 15, 500)[torch.randperm(500), None]
    with torch.no_grad():
        a.mul_(magnitudes)
    actual, expected = run(fp8(), a, w, offs, dout / magnitudes), run(bf16, a, w, offs, dout / magnitudes)
    assert worst_row_sqnr(actual[0], expected[0]) >= 22
    assert worst_row_sqnr(actual[1], expected[1]) >= 22


def dequantized_reference(
    a: Tensor, w: Tensor, offs: Tensor, dout: Tensor, scale_format: ScaleFormat, token_tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Autograd through fp64 products of what quantization leaves of `a`, `w` and `dout`, group by group."""
    groups = plan_groups(offs, a.shape[0])
    live = (torch.arange(a.shape[0]) < offs[-1])[:, None]
    at = groups.token_row.clamp(min=0).long()

    def rows(x: Tensor) -> Tensor:
        padded = reference.dequantize_rows(reference.quantize_rows(x, groups, scale_format))[at]
        assert (padded[:, x.shape[1] :] == 0).all()
        return padded[:, : x.shape[1]].double() * live

    def tokens(x: Tensor, tile: int) -> Tensor:
        operand = reference.quantize_tokens(x, groups, scale_format, TokenLayout.SIDE_BY_SIDE, tile)
        return reference.dequantize_tokens(operand, groups).t()[at].double() * live

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        bounds = itertools.pairwise([0, *offs.tolist(), x.shape[0]])
        matrices = [*weight.transpose(1, 2), weight.new_zeros(weight.shape[2], weight.shape[1])]
        return torch.cat([x[start:end] @ matrix for (start, end), matrix in zip(bounds, matrices, strict=True)])

    padded = reference.dequantize_weight(reference.quantize_weight(w, scale_format)[0])
    weight = padded[:, : w.shape[1], : w.shape[2]].double().requires_grad_()
    rows_of_a, tokens_of_a = rows(a).requires_grad_(), tokens(a, token_tile)
    out = forward(rows_of_a, weight)
    (da,) = torch.autograd.grad(out, rows_of_a, rows(dout))
    (dw,) = torch.autograd.grad(forward(tokens_of_a, weight), weight, tokens(dout, BLOCK))
    return out.detach(), da, dw


@formats
@given(
    sizes=group_sizes(max_groups=4), unused_rows=st.sampled_from([0, 0, 3]), dtype=st.sampled_from(FLOAT_DTYPES),
    kind=st.sampled_from(VALUE_KINDS), seed=st.integers(0, 99),
    k=st.sampled_from((128, *SIZES)), n=st.sampled_from((256, *SIZES)), token_tile=st.sampled_from(TOKEN_TILES),
)  # fmt: skip
def test_equals_autograd_through_dequantized_operands(
    scale_format: ScaleFormat, sizes: list[int], unused_rows: int, dtype: torch.dtype, kind: str, seed: int,
    k: int, n: int, token_tile: int,
) -> None:  # fmt: skip
    """Whatever the values: the op computes exactly the products of the quantized operands, and nothing else."""
    kind = "outliers" if kind == "huge" else kind  # products of huge values overflow
    num_tokens = sum(sizes) + unused_rows
    a = values(kind, (num_tokens, k), dtype, seed)
    w = values(kind, (len(sizes), n, k), dtype, seed + 1) / 1024  # products of outliers overflow fp16
    dout = values(kind, (num_tokens, n), dtype, seed + 2) / 1024
    config = replace(EMULATED, scale_format=scale_format, wgrad_token_tile=token_tile)
    offs = offsets(sizes)
    actual = run(fp8(config), a, w, offs, dout)
    for mine, exact in zip(actual, dequantized_reference(a, w, offs, dout, scale_format, token_tile), strict=True):
        assert mine.dtype == dtype
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-18}[dtype]
        error = (mine.double() - exact).abs()
        # Rounding of the result, and fp32 accumulation; below the smallest normal number of the dtype anything goes.
        assert (error <= exact.abs() * tolerance + largest * 2**-18 + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize(("k", "n"), [(200, 136), (127, 129), (360, 8)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N", "part of more"])
def test_sizes_that_are_no_multiples_of_128(k: int, n: int, dtype: torch.dtype, stored: str) -> None:
    assert_near_to_fp32(FP8Config(kernel_preference=KernelPreference.EMULATED), k, n, dtype, stored, decibels=24)


def assert_near_to_fp32(config: FP8Config, k: int, n: int, dtype: torch.dtype, stored: str, decibels: float) -> None:
    a, w, offs, dout = problem(RAGGED, k, n, dtype, unused_rows=3)
    weight = {
        "E,N,K": w.detach(),
        "E,K,N": w.detach().transpose(1, 2).contiguous().transpose(1, 2),
        "part of more": w.detach().repeat(1, 1, 2)[:, :, :k],
    }[stored]
    actual = run(fp8(config), a, weight, offs, dout)
    for mine, expected in zip(actual, run(in_fp32, a.float(), w.float(), offs, dout.float()), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == expected.shape
        assert sqnr(mine, expected) >= decibels
    assert actual[0].is_contiguous()
    assert (actual[0][500:] == 0).all()
    assert (actual[2][1] == 0).all()


def in_fp32(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Expert by expert; zeros for rows of no group."""
    bounds = itertools.pairwise([0, *offs.tolist()])
    rows = [a[start:end] @ matrix.t() for (start, end), matrix in zip(bounds, w, strict=True)]
    return F.pad(torch.cat(rows), (0, 0, 0, a.shape[0] - int(offs[-1])))


@pytest.mark.parametrize("preference", [KernelPreference.AUTO, KernelPreference.EMULATED])
def test_experts_without_tokens_get_exactly_zero(preference: KernelPreference) -> None:
    a, w, offs, dout = problem([0, 200, 0, 0, 300, 0])
    _, _, dw = run(fp8(FP8Config(kernel_preference=preference)), a, w, offs, dout)
    assert (dw[[0, 2, 3, 5]] == 0).all()
    assert (dw[[1, 4]] != 0).any(-1).any(-1).all()


def test_rows_of_no_group_come_out_as_zeros() -> None:
    a, w, offs, dout = problem([100, 40], unused_rows=150, draw=exact_values)
    with torch.no_grad():
        a[140:] = torch.nan  # whatever lies there
    dout[140:] = torch.inf
    out, da, dw = run(fp8(), a, w, offs, dout)
    assert (out[140:] == 0).all()
    assert (da[140:] == 0).all()
    short = run(fp8(), a[:140], w, offs, dout[:140])
    for actual, expected in zip((out[:140], da[:140], dw), short, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_no_rows(num_experts: int) -> None:
    a, w, offs, dout = problem([0] * num_experts)
    out, da, dw = run(fp8(), a, w, offs, dout)
    assert out.shape == (0, 384)
    assert da.shape == (0, 256)
    assert dw.shape == w.shape
    assert (dw == 0).all()


def test_nan_stays_in_its_row_forward_and_in_its_expert_backward() -> None:
    a, w, offs, dout = problem([100, 100, 100])
    clean = run(fp8(), a, w, offs, dout)
    with torch.no_grad():
        a[150, 7] = torch.nan
    out, da, dw = run(fp8(), a, w, offs, dout)
    assert out[150].isnan().all()
    others = torch.arange(300) != 150
    assert_same_bits(out[others], clean[0][others])
    assert_same_bits(da, clean[1])
    assert dw[1].isnan().any()
    assert_same_bits(dw[[0, 2]], clean[2][[0, 2]])


@pytest.mark.parametrize("frozen", ["a", "w", "both"])
def test_frozen_inputs_pay_nothing(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, w, offs, dout = problem(RAGGED)
    expected = run(fp8(), a, w, offs, dout)
    calls: list[str] = []

    def count(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: object) -> Tensor:
            calls.append(name)
            return original(*args)

        return counted

    backend = BACKENDS[KernelPreference.EMULATED]
    for name in ("m_grouped", "k_grouped"):
        monkeypatch.setattr(backend, name, count(name, getattr(backend, name)))
    a, w = a.detach().requires_grad_(frozen == "w"), w.detach().requires_grad_(frozen == "a")
    with recording_saved_tensors() as saved:
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=EMULATED)
    assert_same_bits(out.detach(), expected[0])
    if frozen == "both":
        assert not out.requires_grad
        assert calls == ["m_grouped"]
        return
    out.backward(dout)
    if frozen == "w":
        assert calls == ["m_grouped", "m_grouped"]
        assert w.grad is None
        assert a.grad is not None
        assert_same_bits(a.grad, expected[1])
        assert all(x.dtype != torch.float8_e4m3fn for x in saved)  # nothing is kept for a wgrad that never comes
    else:
        assert calls == ["m_grouped", "k_grouped"]
        assert a.grad is None
        assert w.grad is not None
        assert_same_bits(w.grad, expected[2])
        assert all(x.untyped_storage().data_ptr() != w.untyped_storage().data_ptr() for x in saved)


def test_no_grad_makes_nothing_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    a, w, offs, _ = problem(RAGGED)

    def never(*args: object) -> None:
        raise AssertionError("the token operand is for wgrad alone")

    monkeypatch.setattr("fp8moe.quantize.reference.quantize_tokens", never)
    with torch.no_grad():
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=EMULATED)
        assert sqnr(out, bf16(a, w, offs)) >= 27
    assert not out.requires_grad


@pytest.mark.parametrize("gradient", ["expanded", "transposed", "row slice", "column slice"])
def test_gradients_of_any_strides(gradient: str) -> None:
    a, w, offs, _ = problem(RAGGED)
    base = torch.randn(1000, 1000).bfloat16()
    dout = {
        "expanded": base[:1, :1].expand(500, 384),
        "transposed": base.t()[:500, :384],
        "row slice": base[::2, :384],
        "column slice": base[:500, :768:2],
    }[gradient]
    for actual, expected in zip(run(fp8(), a, w, offs, dout), run(fp8(), a, w, offs, dout.contiguous()), strict=True):
        assert_same_bits(actual, expected)


def test_gradient_of_a_sum() -> None:
    a, w, offs, _ = problem(RAGGED)
    fp8moe.grouped_mm(a, w.transpose(-2, -1), offs).sum().backward()
    expected = run(fp8(), a, w, offs, torch.ones(500, 384, dtype=torch.bfloat16))
    assert a.grad is not None
    assert_same_bits(a.grad, expected[1])


def test_inputs_of_any_strides() -> None:
    a, w, offs, dout = problem(RAGGED, draw=exact_values)
    expected = run(fp8(), a, w, offs, dout)
    wide = torch.zeros(256, 1000, dtype=a.dtype)
    wide[:, ::2] = a.detach().t()
    stored_kn = w.detach().transpose(1, 2).contiguous()  # an (E, K, N) weight, passed as it is
    a, b = wide[:, ::2].t().requires_grad_(), stored_kn.requires_grad_()
    out = fp8moe.grouped_mm(a, b, offs, config=EMULATED)
    out.backward(dout)
    assert b.grad is not None
    assert_same_bits(out.detach(), expected[0])
    assert_same_bits(b.grad.transpose(1, 2), expected[2])


@pytest.mark.parametrize("token_tile", [256, 512])
def test_long_token_tiles_change_the_weight_gradient_alone(token_tile: int) -> None:
    a, w, offs, dout = problem([700, 0, 1, 300, 129])
    config = FP8Config(kernel_preference=KernelPreference.EMULATED, wgrad_token_tile=token_tile)
    short = replace(config, wgrad_token_tile=128)
    expected, exact = run(fp8(short), a, w, offs, dout), run(bf16, a, w, offs, dout)
    with recording_saved_tensors() as saved:
        actual = run(fp8(config), a, w, offs, dout)
    with recording_saved_tensors() as saved_of_short:
        run(fp8(short), a, w, offs, dout)
    for mine, other in zip(actual[:2], expected[:2], strict=True):
        assert_same_bits(mine, other)
    assert not torch.equal(actual[2], expected[2])
    assert sqnr(actual[2], exact[2]) >= 27
    assert_same_bits(actual[2][2], expected[2][2])  # one row: a tile of 128 holds it
    assert [tensor.shape for tensor in saved] == [tensor.shape for tensor in saved_of_short]


@pytest.mark.parametrize("token_tile", [256, 512])
def test_long_token_tiles_on_the_left_for_a_weight_stored_the_other_way(token_tile: int) -> None:
    a, w, offs, dout = problem(RAGGED)
    config = FP8Config(kernel_preference=KernelPreference.EMULATED, wgrad_token_tile=token_tile)
    expected = run(fp8(config), a, w, offs, dout)
    b = w.detach().transpose(1, 2).contiguous().requires_grad_()
    fp8moe.grouped_mm(a, b, offs, config=config).backward(dout)
    assert b.grad is not None
    assert sqnr(b.grad.transpose(1, 2), expected[2]) >= 45


@pytest.mark.parametrize("dout_needs_gradient", [False, True])
def test_differentiating_twice_is_refused_clearly(dout_needs_gradient: bool) -> None:
    a, w, offs, dout = problem(RAGGED)
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    (da,) = torch.autograd.grad(out, a, dout.requires_grad_(dout_needs_gradient), create_graph=True)
    assert_same_bits(da.detach(), run(fp8(), a, w, offs, dout.detach())[1])
    with pytest.raises(RuntimeError, match=r"fp8moe\.grouped_mm can be differentiated once"):
        da.square().sum().backward()


def test_backward_twice_through_a_retained_graph() -> None:
    a, w, offs, dout = problem(RAGGED)
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    first, second = (torch.autograd.grad(out, (a, w), dout, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)


def test_saved_tensors_may_be_moved_away() -> None:
    """As `save_on_cpu` moves them: into fresh contiguous tensors."""
    a, w, offs, dout = problem(RAGGED)

    def elsewhere(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype).copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, elsewhere):
        moved = run(fp8(), a, w, offs, dout)
    for actual, expected in zip(moved, run(fp8(), a, w, offs, dout), strict=True):
        assert_same_bits(actual, expected)


def test_weight_changed_before_backward_is_refused() -> None:
    a, w, offs, dout = problem(RAGGED)
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_output_dtype_and_parameters_keep_theirs(dtype: torch.dtype) -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    plain = run(fp8(), a, w, offs, dout)
    with torch.autocast("cpu", dtype=dtype):
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    out.backward(dout.to(dtype))
    assert out.dtype == dtype
    assert a.grad is not None
    assert w.grad is not None
    assert a.grad.dtype == w.grad.dtype == torch.float32
    assert_same_bits(out.detach(), plain[0].to(dtype))  # operands are quantized from fp32, not from a rounded copy
    assert sqnr(w.grad, plain[2]) > 35


def test_activation_may_have_another_dtype_than_the_weight() -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    out, da, dw = run(fp8(), a.bfloat16(), w, offs, dout.bfloat16())
    assert (out.dtype, da.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert sqnr(out, run(bf16, a, w, offs, dout)[0]) >= 27


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool) -> None:
    a, w, offs, dout = problem(RAGGED)

    def checkpointed(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return checkpoint(fp8(), a, w, offs, use_reentrant=use_reentrant)

    for actual, expected in zip(run(checkpointed, a, w, offs, dout), run(fp8(), a, w, offs, dout), strict=True):
        assert_same_bits(actual, expected)


@formats
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiles_whole_and_changes_no_bit(scale_format: ScaleFormat, backend: str) -> None:
    config = FP8Config(scale_format=scale_format)
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)

    def layer(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a * 2, w.transpose(-2, -1), offs, config=config) + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for actual, expected in zip(run(compiled, a, w, offs, dout), run(layer, a, w, offs, dout), strict=True):
        assert_same_bits(actual, expected)
    other = offsets([0, 500, 0, 0, 0])  # other routing, same graph
    with torch.compiler.set_stance("fail_on_recompile"):
        for actual, expected in zip(run(compiled, a, w, other, dout), run(layer, a, w, other, dout), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_one_graph_serves_every_number_of_rows() -> None:
    a, w, _, dout = problem(RAGGED)
    torch.compiler.reset()
    compiled = torch.compile(fp8(FP8Config()), fullgraph=True, backend="aot_eager", dynamic=True)
    stance = "default"
    for rows in (500, 3, 128, 400):
        offs = torch.tensor([0, 1, 2, rows, rows], dtype=torch.int32)
        arguments = (a[:rows], w, offs, dout[:rows])
        with torch.compiler.set_stance(stance):
            actual = run(compiled, *arguments)
        for mine, expected in zip(actual, run(fp8(), *arguments), strict=True):
            assert_same_bits(mine, expected)
        stance = "fail_on_recompile"


def test_two_calls_give_the_same_bits() -> None:
    a, w, offs, dout = problem(RAGGED)
    for one, other in zip(run(fp8(), a, w, offs, dout), run(fp8(), a, w, offs, dout), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("num_experts", "rows_each", "limit"), [(8, 512, 0.66), (1, 4096, 0.53)])
def test_saves_half_of_what_bf16_saves(num_experts: int, rows_each: int, limit: float) -> None:
    """What is saved for backward and grows with the rows, in bytes: FP8 against BF16's activation."""
    k, n = 1024, 128
    a, w, offs, _ = problem([rows_each] * num_experts, k=k, n=n)
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.numel() >= a.shape[0] and storage.data_ptr() != w.untyped_storage().data_ptr():
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=EMULATED)
    rows = TokenGroups.capacity_for(a.shape[0], num_experts)
    codes_and_scales = rows * k + rows // 128 * k * 4
    plan = (2 * rows + a.shape[0]) * 4
    saved = sum(storages.values())
    assert saved == codes_and_scales + plan
    assert saved <= limit * a.numel() * 2


@pytest.fixture
def bf16_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if AUTO had taken BF16, which it does on GPUs alone."""
    for module in ("grouped_mm", "experts"):
        monkeypatch.setattr(f"fp8moe.autograd.{module}.backends_for", lambda *args, **kwargs: None)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("bf16_route")
@pytest.mark.parametrize(("k", "n"), [(200, 136), (127, 129), (1, 1), (1, 128), (128, 1)])
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N", "part of more"])
def test_bf16_route_takes_any_size(k: int, n: int, stored: str) -> None:
    assert_near_to_fp32(FP8Config(), k, n, torch.bfloat16, stored, decibels=40)


@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_bf16_route_computes_the_product_and_its_gradients(dtype: torch.dtype) -> None:
    a, w, offs, dout = problem([100, 0, 40], unused_rows=150, dtype=dtype)
    with torch.no_grad():
        a[140:] = torch.nan
    dout[140:] = torch.inf
    actual = run(fp8(FP8Config()), a, w, offs, dout)
    expected = run(bf16, a[:140].bfloat16(), w.bfloat16(), offs, dout[:140].bfloat16())
    for mine, other in zip((actual[0][:140], actual[1][:140], actual[2]), expected, strict=True):
        assert mine.dtype == dtype
        assert sqnr(mine, other) >= 45
    assert (actual[0][140:] == 0).all()
    assert (actual[1][140:] == 0).all()
    assert (actual[2][1] == 0).all()


@pytest.mark.usefixtures("bf16_route")
def test_bf16_route_mends_wrong_offsets_and_lets_them_be_reused() -> None:
    a, w, _, dout = problem([100, 0, 60])
    wrong, mended = (torch.tensor(ends, dtype=torch.int32) for ends in ([100, 50, 900], [100, 100, 160]))
    for actual, expected in zip(
        run(fp8(FP8Config()), a, w, wrong, dout), run(fp8(FP8Config()), a, w, mended, dout), strict=True
    ):
        assert_same_bits(actual, expected)
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), wrong)
    wrong.zero_()
    out.backward(dout)


FULL = FP8Config(assume_full=True)
FULL_OR_NOT = pytest.mark.parametrize("config", [FULL, FP8Config()], ids=["full", "not full"])


@FULL_OR_NOT
@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
def test_bf16_route_is_pytorchs_own_operation(config: FP8Config, stored: str) -> None:
    a, w, offs, dout = problem(RAGGED)
    w = w.detach() if stored == "E,N,K" else w.detach().transpose(1, 2).contiguous().transpose(1, 2)
    for mine, expected in zip(run(fp8(config), a, w, offs, dout), run(bf16, a, w, offs, dout), strict=True):
        assert_same_bits(mine, expected)
        assert mine.stride() == expected.stride()
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=config)
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "GroupedMmBackward0"


@FULL_OR_NOT
@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize(
    "case", ["fp16", "fp32 weight", "odd K", "odd N", "transposed a", "strided w", "unaligned a", "unaligned w", "one"]
)
def test_bf16_route_takes_what_pytorchs_operation_refuses(config: FP8Config, case: str) -> None:
    k, n = (129 if case == "odd K" else 256), (127 if case == "odd N" else 384)
    a, w, offs, dout = (x.detach() for x in problem([1] if case == "one" else RAGGED, k, n))

    def one_later(x: Tensor) -> Tensor:
        flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    expected = run(in_fp32, a.float(), w.float(), offs, dout.float())
    if case == "fp16":
        a, w, dout = a.half(), w.half(), dout.half()
    elif case == "fp32 weight":
        w = w.float()
    elif case == "transposed a":
        a = a.t().contiguous().t()
    elif case == "strided w":
        w = w.repeat_interleave(2, dim=2)[:, :, ::2]
    elif case == "unaligned a":
        a, dout = one_later(a), one_later(dout)
    elif case == "unaligned w":
        w = one_later(w)
    elif case == "one":  # a single row is contiguous whatever its stride is
        a = a.as_strided((1, k), (k + 1, 1))
    actual = run(fp8(config), a, w, offs, dout)
    for mine, other, like in zip(actual, expected, (a, a, w), strict=True):
        assert mine.dtype == like.dtype
        assert sqnr(mine, other) >= 45


@FULL_OR_NOT
@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize("gradient", ["expanded", "transposed", "row slice", "column slice", "unaligned"])
def test_bf16_route_takes_gradients_of_any_strides(config: FP8Config, gradient: str) -> None:
    a, w, offs, _ = problem(RAGGED)
    base = torch.randn(1000, 1000).bfloat16()
    dout = {
        "expanded": base[:1, :1].expand(500, 384),
        "transposed": base.t()[:500, :384],
        "row slice": base[::2, :384],
        "column slice": base[:500, :768:2],
        "unaligned": base.flatten()[1 : 1 + 500 * 384].view(500, 384),
    }[gradient]
    for actual, expected in zip(
        run(fp8(config), a, w, offs, dout), run(bf16, a, w, offs, dout.clone().contiguous()), strict=True
    ):
        assert sqnr(actual, expected) >= 60


@FULL_OR_NOT
@pytest.mark.usefixtures("bf16_route")
def test_bf16_route_lets_saved_tensors_be_moved_and_hooks_see_gradients(config: FP8Config) -> None:
    a, w, offs, dout = problem(RAGGED)
    expected = run(fp8(config), a, w, offs, dout)

    def elsewhere(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype).copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, elsewhere):
        moved = run(fp8(config), a, w, offs, dout)
    for actual, other in zip(moved, expected, strict=True):
        assert_same_bits(actual, other)
    seen: list[Tensor] = []
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=config)
    out.register_hook(seen.append)
    a.register_hook(seen.append)
    out.mul_(2)
    out.sum().backward()
    assert (seen[0] == 2).all()
    assert_same_bits(seen[1], run(fp8(config), a, w, offs, torch.full_like(dout, 2))[1])


@pytest.mark.usefixtures("bf16_route", "poisoned_memory")
@pytest.mark.parametrize("dout_needs_gradient", [False, True])
def test_bf16_route_refuses_to_be_differentiated_twice_or_does_it_right(dout_needs_gradient: bool) -> None:
    a, w, offs, dout = problem([100, 0, 60], unused_rows=30)
    dout.requires_grad_(dout_needs_gradient)
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    (da,) = torch.autograd.grad(out, a, dout, create_graph=True)
    assert (da[160:] == 0).all()
    with pytest.raises(RuntimeError, match=r"fp8moe\.grouped_mm can be differentiated once"):
        da.square().sum().backward()
    inputs = a[:160], w, offs
    seconds = []
    for op in (fp8(FULL), bf16):
        a, w = (x.detach().requires_grad_() for x in inputs[:2])
        (da,) = torch.autograd.grad(op(a, w, offs), a, dout[:160].detach(), create_graph=True)
        seconds.append(torch.autograd.grad(da.square().sum(), w))
    assert_same_bits(seconds[0][0], seconds[1][0])


@FULL_OR_NOT
@pytest.mark.usefixtures("bf16_route")
def test_bf16_route_shows_one_operator_to_who_watches(config: FP8Config) -> None:
    a, w, offs, _ = problem(RAGGED)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) for x in (a, w, offs)]
    for context in (nullcontext(), mode):  # outside the mode too
        with context:
            assert fp8moe.grouped_mm(fake[0], fake[1].transpose(1, 2), fake[2], config=config).shape == (500, 384)
    with Operators() as seen:
        fp8moe.grouped_mm(a, w.transpose(1, 2), offs, config=config)
    assert torch.ops.fp8moe.m_grouped_bf16.default in seen.called
    with torch.profiler.profile() as profile:
        out = fp8moe.grouped_mm(a, w.transpose(1, 2), offs, config=config)
    assert "aten::_grouped_mm" in {event.key for event in profile.key_averages()}
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "GroupedMmBackward0"  # what is profiled is what runs


class Operators(TorchDispatchMode):
    """Records which are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("bf16_route")
def test_full_groups_are_promised_and_the_promise_is_checked() -> None:
    a, w, offs, dout = problem([100, 0, 60])
    for actual, expected in zip(run(fp8(FULL), a, w, offs, dout), run(fp8(FP8Config()), a, w, offs, dout), strict=True):
        assert_same_bits(actual, expected)
    checked = FP8Config(assume_full=True, debug=True)
    run(fp8(checked), a, w, offs, dout)
    for wrong in ([100, 100, 159], [100, 90, 160]):
        with pytest.raises(ValueError, match=r"assume_full=True\) the last must be 160; it is"):
            run(fp8(checked), a, w, torch.tensor(wrong, dtype=torch.int32), dout)


@FULL_OR_NOT
@pytest.mark.usefixtures("bf16_route")
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_bf16_route_compiles_whole_for_every_number_of_rows(config: FP8Config) -> None:
    a, w, _, dout = problem(RAGGED)
    torch.compiler.reset()
    compiled = torch.compile(fp8(config), fullgraph=True, backend="aot_eager", dynamic=True)
    stance = "default"
    for rows in (500, 3, 128):
        offs = torch.tensor([0, 1, 2, rows, rows], dtype=torch.int32)
        arguments = (a[:rows], w, offs, dout[:rows])
        with torch.compiler.set_stance(stance):
            actual = run(compiled, *arguments)
        for mine, expected in zip(actual, run(fp8(config), *arguments), strict=True):
            assert_same_bits(mine, expected)
        stance = "fail_on_recompile"


@pytest.mark.usefixtures("bf16_route")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bf16_route_multiplies_in_bf16_under_any_autocast(dtype: torch.dtype) -> None:
    a, w, offs, dout = problem(RAGGED)
    plain = run(fp8(FP8Config()), a, w, offs, dout)
    with torch.autocast("cpu", dtype=dtype):
        out, da, dw = run(fp8(FP8Config()), a, w, offs, dout.to(dtype))
    assert out.dtype == dtype
    assert_same_bits(out, plain[0].to(dtype))
    assert sqnr(da, plain[1]) >= 45
    assert sqnr(dw, plain[2]) >= 45


@pytest.mark.usefixtures("bf16_route")
@pytest.mark.parametrize("frozen", ["a", "w"])
def test_bf16_route_keeps_nothing_for_frozen_inputs(frozen: str) -> None:
    a, w, offs, dout = problem([100, 0, 60])
    a, w = a.detach().requires_grad_(frozen == "w"), w.detach().requires_grad_(frozen == "a")
    with recording_saved_tensors() as kept:
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    out.backward(dout)
    assert [x.dim() for x in kept if x.dim() > 1] == ([3] if frozen == "w" else [2])


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_the_bf16_that_auto_falls_back_to_keeps_the_same_promises(out_dtype: torch.dtype) -> None:
    a, w, offs, dout = (x.detach() for x in problem([100, 0, 40], unused_rows=150, draw=exact_values))
    groups = (slice(0, 100), slice(100, 100), slice(100, 140))
    a64, w64, dout64 = a.double(), w.double(), dout.double()
    out = torch.cat([*(a64[rows] @ w64[e].t() for e, rows in enumerate(groups)), a64.new_zeros(150, 384)])
    dw = torch.stack([dout64[rows].t() @ a64[rows] for rows in groups])
    column_major = a.t().contiguous().t()
    strided = w.repeat_interleave(2, dim=2)[:, :, ::2]  # equal to w, neither row- nor column-major
    for lhs, rhs in ((a, w), (column_major, strided)):
        for product, exact in (
            (m_grouped_bf16(lhs, rhs.transpose(1, 2), offs, out_dtype), out),
            (k_grouped_bf16(dout, lhs, offs, out_dtype), dw),
        ):
            assert product.dtype == out_dtype
            assert ((product.double() - exact).abs() <= exact.abs() * 2**-8).all()  # rounded to BF16
    assert (k_grouped_bf16(dout[:0], a[:0], offs, out_dtype) == 0).all()
    assert m_grouped_bf16(a[:0], w.transpose(1, 2), offs, out_dtype).shape == (0, 384)
