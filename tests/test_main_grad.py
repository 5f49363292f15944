"""`grouped_mm(..., main_grad=...)`: the weight gradient added in place to an fp32 tensor of the caller."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import ScaleFormat
from fp8moe.gemm.deepgemm import DeepGemm
from fp8moe.gemm.emulated import Emulated
from fp8moe.operands import TokenLayout, TokenOperand
from fp8moe.quantize import quantize_tokens
from fp8moe.rows.groups import plan_groups
from tests.generators import exact_values, offsets
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr
from tests.test_grouped_mm import RAGGED, bf16_route, fp8, needs_compiler, problem, run

__all__ = ["bf16_route"]  # a fixture

layouts = pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])


def empty_main_grad(w: Tensor, stored: str = "E,N,K") -> Tensor:
    """Zeros `(E, K, N)` for a weight `(E, N, K)`."""
    if stored == "E,N,K":
        return torch.zeros(w.shape).transpose(1, 2)
    return torch.zeros(w.transpose(1, 2).shape)


def into(main_grad: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda a, w, offs: fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, main_grad=main_grad)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_gradient_without_it_and_accumulates(stored: str, dtype: torch.dtype) -> None:
    a, w, offs, dout = problem(RAGGED, dtype=dtype, draw=exact_values)
    expected = run(fp8(), a.float(), w.float(), offs, dout.float())
    main_grad = empty_main_grad(w, stored)
    version = main_grad._version
    out = into(main_grad)(a, w, offs)
    out.backward(dout)
    assert w.grad is None
    assert a.grad is not None
    assert_same_bits(main_grad.transpose(1, 2), expected[2])  # in fp32, whatever the dtype of the weight
    assert_same_bits(out.detach(), expected[0].to(dtype))
    assert_same_bits(a.grad, expected[1].to(dtype))
    assert main_grad._version > version
    into(main_grad)(a, w, offs).backward(dout)
    assert_same_bits(main_grad.transpose(1, 2), 2 * expected[2])


@layouts
def test_a_weight_stored_kn(stored: str) -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32, draw=exact_values)
    b = w.detach().transpose(1, 2).contiguous().requires_grad_()
    main_grad = empty_main_grad(w, stored)
    fp8moe.grouped_mm(a, b, offs, main_grad=main_grad).backward(dout)
    assert b.grad is None
    assert_same_bits(main_grad.transpose(1, 2), run(fp8(), a, w, offs, dout)[2])


def test_the_ordinary_gradient_has_the_layout_of_the_weight() -> None:
    """Autograd takes it as `.grad` without a copy."""
    a, w, offs, dout = problem(RAGGED)
    for b in (w.detach().transpose(1, 2), w.detach().transpose(1, 2).contiguous()):
        b.requires_grad_()
        (db,) = torch.autograd.grad(fp8moe.grouped_mm(a, b, offs), b, dout)
        assert db.stride() == b.stride()


@pytest.mark.parametrize("route", ["fp8", "bf16"])
def test_groups_without_tokens_keep_what_they_have(route: str, request: pytest.FixtureRequest) -> None:
    if route == "bf16":
        request.getfixturevalue("bf16_route")
    a, w, offs, dout = problem([0, 200, 0, 300])
    main_grad = torch.randn(w.shape).transpose(1, 2)
    before = main_grad.clone()
    into(main_grad)(a, w, offs).backward(dout)
    assert_same_bits(main_grad[[0, 2]], before[[0, 2]])
    assert (main_grad[[1, 3]] != before[[1, 3]]).float().mean() > 0.9
    after = main_grad.clone()
    into(main_grad)(
        a[:0],
        w,
        torch.zeros_like(offs),
    ).sum().backward()  # no tokens at all
    assert_same_bits(main_grad, after)


def test_two_forwards_before_two_backwards() -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    main_grad = empty_main_grad(w)
    outs = [into(main_grad)(a, w, offs) for _ in range(2)]
    for out in outs:
        out.backward(dout)
    assert_same_bits(main_grad.transpose(1, 2), 2 * run(fp8(), a, w, offs, dout)[2])


def test_it_is_not_among_the_saved_tensors() -> None:
    a, w, offs, _ = problem(RAGGED)
    main_grad = empty_main_grad(w)
    with recording_saved_tensors() as saved:
        into(main_grad)(a, w, offs)
    assert saved
    assert all(x.untyped_storage().data_ptr() != main_grad.untyped_storage().data_ptr() for x in saved)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_adds_once(use_reentrant: bool) -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    main_grad = empty_main_grad(w)
    out = checkpoint(into(main_grad), a, w, offs, use_reentrant=use_reentrant)
    out.backward(dout)
    assert_same_bits(main_grad.transpose(1, 2), run(fp8(), a, w, offs, dout)[2])
    assert w.grad is None


def test_autocast() -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32)
    main_grad = empty_main_grad(w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = into(main_grad)(a, w, offs)
    out.backward(dout.bfloat16())
    assert_same_bits(main_grad.transpose(1, 2), run(fp8(), a, w, offs, dout.bfloat16().float())[2])


def test_a_frozen_weight_leaves_it_alone() -> None:
    a, w, offs, dout = problem(RAGGED)
    main_grad = torch.full(w.shape, torch.nan).transpose(1, 2)
    into(main_grad)(a, w.detach(), offs).backward(dout)
    assert a.grad is not None
    assert main_grad.isnan().all()


@pytest.mark.usefixtures("bf16_route")
@layouts
def test_bf16_route(stored: str) -> None:
    a, w, offs, dout = problem(RAGGED)
    expected = run(fp8(), a, w, offs, dout)
    main_grad = empty_main_grad(w, stored)
    for _ in range(2):
        into(main_grad)(a, w, offs).backward(dout)
    assert w.grad is None
    assert main_grad.dtype == torch.float32
    assert sqnr(main_grad.transpose(1, 2), 2 * expected[2].float()) >= 45
    assert (main_grad[1] == 0).all()


@layouts
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiles_whole(backend: str, stored: str) -> None:
    a, w, offs, dout = problem(RAGGED, dtype=torch.float32, draw=exact_values)
    main_grad, expected = empty_main_grad(w, stored), run(fp8(), a, w, offs, dout)

    def layer(a: Tensor, w: Tensor, offs: Tensor, main_grad: Tensor) -> Tensor:
        return into(main_grad)(a * 1, w, offs)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for times in (1, 2):
        out = compiled(a, w, offs, main_grad)
        out.backward(dout)
        assert_same_bits(out.detach(), expected[0])
        assert_same_bits(main_grad.transpose(1, 2), times * expected[2])
    assert w.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: g.tolist(), TypeError, r"main_grad is a list; it must be a torch\.Tensor or None"),
        (lambda g: g.bfloat16(), TypeError, r"main_grad has dtype torch\.bfloat16; it must be torch\.float32"),
        (lambda g: g.transpose(1, 2), ValueError, r"main_grad has shape \(5, 384, 256\); .* w\.main_grad\.transpose"),
        (lambda g: g.to("meta"), ValueError, r"main_grad is on meta and its weight on cpu"),
        (lambda g: g.requires_grad_(), ValueError, r"main_grad requires a gradient itself; pass it detached"),
        (lambda g: g[:1].expand(5, 256, 384), ValueError, r"main_grad has strides \(0, 1, 256\); it must be contig"),
        (lambda g: torch.zeros(5, 256, 768)[:, :, ::2], ValueError, r"main_grad has strides .*torch\.zeros_like"),
    ],
)
def test_bad_main_grad(change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    a, w, offs, _ = problem(RAGGED)
    with pytest.raises(error, match=message):
        into(change(empty_main_grad(w)))(a, w, offs)


@pytest.mark.parametrize("num_experts", [3, 5])
@pytest.mark.parametrize(("n", "k"), [(384, 256), (256, 512)])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "at any address"])
def test_deepgemm_adds_in_place_where_its_kernel_can(
    monkeypatch: pytest.MonkeyPatch, num_experts: int, n: int, k: int, offset: int
) -> None:
    """With a stand-in for the kernel, that takes what the kernel takes: TMA addresses, enough groups."""
    written: list[Tensor] = []

    def kernel(
        lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], d: Tensor, rows_on_host: list[int],
        rows: Tensor, c: Tensor, recipe: tuple[int, ...],
    ) -> None:  # fmt: skip
        assert c is d
        assert d.is_contiguous()
        assert d.data_ptr() % 16 == 0
        assert len(rows_on_host) == len(rows) == len(d)
        assert len(d) >= 5 or (n % 256 == 0 and k % 256 == 0)
        written.append(d)
        start = 0
        for expert, size in enumerate(rows.tolist()):
            tiles = slice(start // 128, (start + size) // 128)
            sides = []
            for data, scale in (lhs, rhs):
                features = scale.shape[0]
                block = data[features * start : features * (start + size)].float().view(features, -1, 128)
                sides.append((block * scale[:, tiles, None]).view(features, size))
            d.numpy()[expert] += (sides[0] @ sides[1].t()).numpy()  # past the version counter, as a kernel does
            start += size

    monkeypatch.setattr(
        "fp8moe.gemm.deepgemm._deep_gemm", lambda: SimpleNamespace(k_grouped_fp8_gemm_nt_contiguous=kernel)
    )
    sizes = [130, 0, 300, 5, 77][:num_experts]
    groups = plan_groups(offsets(sizes), sum(sizes))
    dout, a = torch.randn(sum(sizes), n), torch.randn(sum(sizes), k)

    def operands(layout: TokenLayout) -> tuple[TokenOperand, TokenOperand]:
        lhs, rhs = (quantize_tokens(x, groups, ScaleFormat.FP32, layout) for x in (dout, a))
        return lhs, rhs

    start = torch.randn(num_experts, n, k)
    memory = torch.empty(start.numel() + 4)
    target = memory[offset : offset + start.numel()].view(num_experts, n, k).copy_(start)
    version = target._version
    DeepGemm().k_grouped_add(*operands(TokenLayout.PER_EXPERT), groups, target)
    reference = start.clone()
    Emulated().k_grouped_add(*operands(TokenLayout.SIDE_BY_SIDE), groups, reference)
    assert sqnr(target - start, reference - start) >= 100
    assert_same_bits(target[1], start[1])
    assert target._version > version
    in_place = offset == 0 and (num_experts == 5 or (n, k) == (256, 512))
    assert (written[0].data_ptr() == target.data_ptr()) == in_place
    product = DeepGemm().k_grouped(*operands(TokenLayout.PER_EXPERT), groups, torch.float32)
    assert product.shape == (num_experts, n, k)
    assert sqnr(product, reference - start) >= 100


def two_products(route: str, request: pytest.FixtureRequest) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Two layers `(M, K) -> (M, N) -> (M, K)`: their input, weights, main_grads and the output."""
    if route == "bf16":
        request.getfixturevalue("bf16_route")
    a, w, _, _ = problem(RAGGED, dtype=torch.float32)
    weights = [w, w.detach().transpose(1, 2).contiguous().requires_grad_()]
    main_grads = [torch.zeros(weight.shape) for weight in weights]
    return a, weights, main_grads, through(a, weights, main_grads)


def through(a: Tensor, weights: list[Tensor], main_grads: list[Tensor]) -> Tensor:
    for w, main_grad in zip(weights, main_grads, strict=True):
        a = fp8moe.grouped_mm(a, w.transpose(1, 2), offsets(RAGGED), main_grad=main_grad.transpose(1, 2))
    return a


@pytest.mark.parametrize("route", ["fp8", "bf16"])
def test_a_backward_that_does_not_go_on_to_the_weight_leaves_it_alone(
    route: str, request: pytest.FixtureRequest
) -> None:
    a, weights, main_grads, out = two_products(route, request)
    dout = torch.randn(out.shape)
    (da,) = torch.autograd.grad(out, a, dout, retain_graph=True)
    assert all((main_grad == 0).all() for main_grad in main_grads)
    torch.autograd.backward(out, dout, retain_graph=True, inputs=[a])
    assert all((main_grad == 0).all() for main_grad in main_grads)
    assert a.grad is not None
    assert_same_bits(a.grad, da)
    torch.autograd.backward(out, dout, inputs=[weights[1]], retain_graph=True)
    assert (main_grads[0] == 0).all()
    once = main_grads[1].clone()
    assert (once != 0).float().mean() > 0.5
    out.backward(dout)
    assert_same_bits(main_grads[1], 2 * once)
    assert (main_grads[0] != 0).float().mean() > 0.5
    assert all(weight.grad is None for weight in weights)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return 2 * dout


def splits_backward() -> bool:
    """Whether this PyTorch starts the second half of a backward at the node of any `autograd.Function`; 2.11 cannot."""
    node = Doubled.apply(torch.zeros(1, requires_grad=True)).grad_fn
    try:
        return node._input_metadata is not None
    except RuntimeError:
        return False


@pytest.mark.skipif(not splits_backward(), reason="this PyTorch's stage_backward_weight takes no autograd.Function")
@pytest.mark.parametrize("route", ["fp8", "bf16"])
def test_both_halves_of_a_zero_bubble_backward_add_once(route: str, request: pytest.FixtureRequest) -> None:
    a, weights, expected, out = two_products(route, request)
    dout = torch.randn(out.shape)
    out.backward(dout)
    main_grads = [torch.zeros(weight.shape) for weight in weights]
    parameters: list[Any] = weights  # they are leaves, which is all that counts
    for times in (1, 2):
        out = through(a, weights, main_grads)
        (da,), groups = stage_backward_input([out], [dout], [a], iter(parameters))
        assert da is not None
        for main_grad, once in zip(main_grads, expected, strict=True):
            assert torch.equal(main_grad, (times - 1) * once)
        stage_backward_weight(iter(parameters), groups)
        for main_grad, once in zip(main_grads, expected, strict=True):
            assert_same_bits(main_grad, times * once)


def test_a_layer_adds_only_where_the_backward_goes_on_to_its_weights() -> None:
    hidden = torch.randn(40, 128, requires_grad=True)
    ids, router = torch.randint(0, 3, (40, 2)), torch.rand(40, 2)
    weights = [torch.randn(3, 256, 128, requires_grad=True), torch.randn(3, 128, 128, requires_grad=True)]
    main_grads = torch.zeros(3, 256, 128), torch.zeros(3, 128, 128)
    out = fp8moe.moe_forward(hidden, ids, router, *weights, main_grads=main_grads)
    plain = fp8moe.moe_forward(hidden, ids, router, *weights)
    dout = torch.randn(out.shape)
    expected = torch.autograd.grad(plain, [hidden, *weights], dout)
    (d_hidden,) = torch.autograd.grad(out, hidden, dout, retain_graph=True)
    assert_same_bits(d_hidden, expected[0])
    assert all((main_grad == 0).all() for main_grad in main_grads)
    torch.autograd.backward(out, dout, inputs=[weights[1]], retain_graph=True)
    assert (main_grads[0] == 0).all()
    assert_same_bits(main_grads[1], expected[2])
    torch.autograd.backward(out, dout, inputs=[weights[0]])
    assert_same_bits(main_grads[0], expected[1])
    assert_same_bits(main_grads[1], expected[2])


class Product(nn.Module):
    """One product whose weight gradient goes to a main_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 128, 128))
        self.main_grad = torch.zeros(3, 128, 128)

    def forward(self, a: Tensor) -> Tensor:
        offs = offsets([10, 20, 30])
        main_grad = self.main_grad.transpose(1, 2)
        return fp8moe.grouped_mm(a, self.w.transpose(1, 2), offs, main_grad=main_grad)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about one rank
def test_who_reduces_gradients_is_told() -> None:
    a = torch.randn(60, 128)
    ddp = nn.parallel.DistributedDataParallel(Product())
    with pytest.raises(
        ValueError, match=r"main_grad is given within DistributedDataParallel, which reduces \.grad alone"
    ):
        ddp(a)
    with ddp.no_sync():
        ddp(a).sum().backward()
    assert (ddp.module.main_grad != 0).any()
    sharded = Product()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="main_grad is of a weight of FSDP"):
        sharded(a)
    Product()(a)  # what they do not hold is none of their business


class Switch:
    on = False


def guards_attributes_of_classes() -> bool:
    """Whether compiled code sees that one has changed: one tells whose forward DDP runs. torch 2.11 does not."""
    compiled = torch.compile(lambda x: x + 1 if Switch.on else x, fullgraph=True, backend="eager")
    found = []
    for Switch.on in (False, True, False):
        found.append(compiled(torch.zeros(1)).item())
    return found == [0, 1, 0]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about one rank, and Dynamo
def test_compiled_code_tells_who_reduces_gradients_too() -> None:
    if not guards_attributes_of_classes():
        pytest.skip("this PyTorch does not guard attributes of classes")
    a = torch.randn(60, 128)
    torch.compiler.reset()
    alone = torch.compile(Product(), fullgraph=True, backend="aot_eager")
    ddp = nn.parallel.DistributedDataParallel(torch.compile(Product(), fullgraph=True, backend="aot_eager"))
    for _ in range(2):  # one code object for both
        alone(a).sum().backward()
        with pytest.raises(Exception, match="main_grad is given within DistributedDataParallel"):
            ddp(a)
        with ddp.no_sync():
            ddp(a).sum().backward()
    assert (ddp.module.main_grad != 0).any()
