"""What only a GPU can show: no synchronization, CUDA graphs, 64-bit offsets, the BF16 route, devices agreeing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, KernelPreference, ScaleFormat, SwiGLUExperts, quantize
from fp8moe.operands import TokenGroups, TokenLayout
from fp8moe.quantize import reference
from fp8moe.rows.groups import plan_groups
from tests.generators import offsets
from tests.gpu.support import EMULATED, no_synchronization, poison_free_memory, problem
from tests.measures import assert_same_bits, sqnr
from tests.test_grouped_mm import RAGGED, bf16, fp8, run

pytestmark = pytest.mark.gpu
AUTO = FP8Config()


def both_weights(w: Tensor) -> list[Tensor]:
    """Codes for forward and dgrad, and their scales."""
    num_experts, n, k = w.shape
    forward, dgrad = (w.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in (w.shape, (num_experts, k, n)))
    scale = w.new_empty((num_experts, n // 128, k // 128), dtype=torch.float32)
    quantize.quantize_weight_into(w, ScaleFormat.FP32, scale, forward, dgrad)
    return [forward, dgrad, scale]


@pytest.mark.parametrize("scale_format", ScaleFormat)
def test_emulation_on_the_gpu_equals_the_cpus(scale_format: ScaleFormat) -> None:
    config = FP8Config(kernel_preference=KernelPreference.EMULATED, scale_format=scale_format)
    problem_ = problem(RAGGED, unused_rows=7)
    on_gpu = run(fp8(config), *problem_)
    on_cpu = run(fp8(config), *(x.cpu() for x in problem_))
    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        assert sqnr(actual.cpu(), expected) >= 50  # equal operands; sums in another order, rounded to BF16
    assert (on_gpu[0][500:] == 0).all()
    assert (on_gpu[1][500:] == 0).all()
    assert (on_gpu[2][1] == 0).all()


def test_auto_keeps_its_promises() -> None:
    a, w, offs, dout = problem([0, *RAGGED, 0], unused_rows=90)
    used = 500
    with torch.no_grad():
        a[used:] = torch.nan
    dout[used:] = torch.inf
    with no_synchronization():
        out, da, dw = run(fp8(AUTO), a, w, offs, dout)
    expected = run(bf16, a[:used], w, offs, dout[:used])
    assert sqnr(out[:used], expected[0]) >= 27
    assert sqnr(da[:used], expected[1]) >= 26
    assert sqnr(dw, expected[2]) >= 26
    assert (out[used:] == 0).all()
    assert (da[used:] == 0).all()
    assert (dw[[0, 2, 6]] == 0).all()


@pytest.mark.parametrize("config", [AUTO, FP8Config(assume_full=True)], ids=["not full", "full"])
def test_the_bf16_route_is_pytorchs_own_operation(config: FP8Config) -> None:
    a, w, offs, dout = problem([0, *RAGGED, 0])  # of sizes for which FP8 does not pay
    poison_free_memory()
    with no_synchronization():
        actual = run(fp8(config), a, w, offs, dout)
    for mine, expected in zip(actual, run(bf16, a, w, offs, dout), strict=True):
        assert_same_bits(mine, expected)
    out = fp8moe.grouped_mm(a.requires_grad_(), w.transpose(-2, -1), offs, config=config)
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "GroupedMmBackward0"
    out.sum().backward()  # an expanded gradient
    assert a.grad is not None
    assert_same_bits(a.grad, run(bf16, a, w, offs, torch.ones_like(dout))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_auto_in_other_dtypes(dtype: torch.dtype) -> None:
    a, w, offs, dout = (x if x.dtype == torch.int32 else x.to(dtype) for x in problem(RAGGED))
    actual = run(fp8(AUTO), a, w, offs, dout)
    expected = run(fp8(EMULATED), a.cpu(), w.cpu(), offs.cpu(), dout.cpu())
    for mine, other in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        assert sqnr(mine.cpu(), other) >= 26


@pytest.mark.parametrize("gradient", ["expanded", "transposed"])
def test_auto_takes_gradients_of_any_strides(gradient: str) -> None:
    a, w, offs, _ = problem(RAGGED)
    base = torch.randn(600, 600, device="cuda", dtype=torch.bfloat16)
    dout = base[:1, :1].expand(500, 384) if gradient == "expanded" else base.t()[:500, :384]
    for actual, expected in zip(
        run(fp8(AUTO), a, w, offs, dout), run(fp8(AUTO), a, w, offs, dout.contiguous()), strict=True
    ):
        assert_same_bits(actual, expected)


def test_auto_without_rows() -> None:
    out, da, dw = run(fp8(AUTO), *problem([0, 0]))
    assert out.shape == (0, 384)
    assert da.shape == (0, 256)
    assert (dw == 0).all()


@pytest.mark.parametrize("layout", TokenLayout)
def test_plan_and_quantization_replay_in_a_graph_with_other_routing(layout: TokenLayout) -> None:
    a, w, offs, _ = problem([100, 100, 100, 100, 100])

    def step() -> list[Tensor]:
        groups = plan_groups(offs, a.shape[0])
        rows, tokens = quantize.quantize_rows_and_tokens(a, groups, ScaleFormat.POW2, layout)
        return [*groups.tensors, rows.data, rows.scale, tokens.data, *both_weights(w)]

    step()  # compile before capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for sizes in ([0, 0, 500, 0, 0], [1, 127, 128, 129, 115], RAGGED):
        offs.copy_(offsets(sizes, "cuda"))
        for buffer in captured[5:]:
            buffer.view(torch.uint8).fill_(0xA5) if buffer.is_contiguous() else buffer.fill_(7.0)
        graph.replay()
        used = int(captured[1][-1])
        for actual, expected in zip(captured[:7], step()[:7], strict=True):
            live = used if actual.dim() == 2 else None
            assert_same_bits(actual[:live], expected[:live])
        groups = TokenGroups(500, *captured[:5])
        expected_tokens = reference.quantize_tokens(a, groups, ScaleFormat.POW2, layout)
        flat = used * 256 if layout is TokenLayout.PER_EXPERT else None
        live_tokens = (slice(flat),) if flat is not None else (slice(None), slice(used))
        assert_same_bits(captured[7][live_tokens], expected_tokens.data[live_tokens])


def test_operators_never_synchronize() -> None:
    a, w, offs, _ = problem(RAGGED)
    with no_synchronization():
        groups = plan_groups(offs, a.shape[0])
        for layout in TokenLayout:
            quantize.quantize_rows_and_tokens(a, groups, ScaleFormat.POW2, layout)
        both_weights(w)


@pytest.mark.large
def test_more_row_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    """65537 row blocks, 3.2e9 elements: the first, the middle and the last rows against the reference."""
    num_tokens, features = 65537 * 128 - 3, 384
    x = torch.randn(num_tokens, features, device="cuda", dtype=torch.bfloat16)
    groups = plan_groups(offsets([num_tokens], "cuda"), num_tokens)
    for layout in TokenLayout:
        rows, tokens = quantize.quantize_rows_and_tokens(x, groups, ScaleFormat.FP32, layout)
        token_data = tokens.data.view(features, groups.capacity)
        for block in (0, 43691, 65536):
            part = slice(block * 128, (block + 1) * 128)
            sample = x[part]
            sample_groups = plan_groups(offsets([sample.shape[0]], "cuda"), sample.shape[0])
            expected_rows = reference.quantize_rows(sample, sample_groups, ScaleFormat.FP32)
            expected = reference.quantize_tokens(sample, sample_groups, ScaleFormat.FP32, TokenLayout.SIDE_BY_SIDE)
            assert_same_bits(rows.data[part], expected_rows.data)
            assert_same_bits(rows.scale[part], expected_rows.scale)
            assert_same_bits(token_data[:, part], expected.data)
            assert_same_bits(tokens.scale[:, block : block + 1], expected.scale)


@pytest.mark.large
def test_weight_with_more_blocks_than_a_grid_axis_and_more_elements_than_int32() -> None:
    w = torch.randn(3, 16384, 49152, device="cuda", dtype=torch.bfloat16)  # 147456 blocks, 2.4e9 elements
    forward_data, dgrad_data, scale = both_weights(w)
    for expert, n in ((0, 0), (2, 16384 - 128)):
        part = slice(n, n + 128)
        expected_forward, expected_dgrad = reference.quantize_weight(w[expert : expert + 1, part], ScaleFormat.FP32)
        assert_same_bits(forward_data[expert : expert + 1, part], expected_forward.data)
        assert_same_bits(dgrad_data[expert : expert + 1, :, part], expected_dgrad.data)
        assert_same_bits(scale[expert, n // 128], expected_forward.scale[0, 0])


@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of what they do themselves
@pytest.mark.parametrize("preference", [KernelPreference.AUTO, KernelPreference.EMULATED])
def test_compiles_whole(preference: KernelPreference) -> None:
    config = FP8Config(kernel_preference=preference)
    a, w, offs, dout = problem(RAGGED)

    def layer(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a * 2, w.transpose(-2, -1), offs, config=config) + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(run(compiled, a, w, offs, dout), run(layer, a, w, offs, dout), strict=True):
        assert sqnr(actual, expected) >= 45


def test_autocast() -> None:
    a, w, offs, dout = problem(RAGGED)
    a, w = a.float().requires_grad_(), w.float().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)
    out.backward(dout)
    assert out.dtype == torch.bfloat16
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    expected = F.grouped_mm(a.detach().bfloat16(), w.detach().bfloat16().transpose(-2, -1), offs=offs)
    assert sqnr(out, expected) >= 27


def test_experts_module_never_synchronizes() -> None:
    experts = SwiGLUExperts(8, 256, 128, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights, ids = torch.randn(300, 8, device="cuda").softmax(-1).topk(2)
    experts(hidden, ids, weights).sum().backward()  # compile kernels
    with no_synchronization():
        experts(hidden, ids, weights).sum().backward()


def test_debug_checks_on_the_device() -> None:
    a, w, offs, _ = problem(RAGGED)
    with no_synchronization():
        fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=FP8Config(debug=True))
    program = (
        "import torch, fp8moe\n"
        "a, b = torch.ones(9, 128, device='cuda'), torch.ones(2, 128, 128, device='cuda')\n"
        "offs = torch.tensor([5, 3], dtype=torch.int32, device='cuda')\n"
        "fp8moe.grouped_mm(a, b, offs, config=fp8moe.FP8Config(debug=True))\n"
        "torch.cuda.synchronize()\n"
    )  # in a process of its own: a failed device assertion ends all use of the GPU
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert result.returncode != 0
    assert "assert" in result.stderr
