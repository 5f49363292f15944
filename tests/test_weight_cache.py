"""`WeightCache`: whatever happens to a weight, the results are those without a cache, bit for bit."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import FP8Config, ScaleFormat, SwiGLUExperts, WeightCache
from fp8moe.quantize import (
    quantize_weight_for_dgrad,
    quantize_weight_for_forward,
    quantize_weight_into,
    weight_cache,
    weight_source,
)
from fp8moe.quantize.weights import Split
from tests.generators import offsets
from tests.measures import assert_same_bits, sqnr
from tests.test_grouped_mm import bf16_route, needs_compiler

__all__ = ["bf16_route"]  # a fixture

E, N, K = 3, 256, 128
SIZES = [70, 0, 130]
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that caches quantize, as they do."""
    seen: list[Tensor] = []
    original = quantize_weight_into

    def counted(w: Tensor, *args: Any, **options: Any) -> None:
        changed = args[-1]
        if changed is None or changed.any():
            seen.append(w)
        original(w, *args, **options)

    monkeypatch.setattr("fp8moe.quantize.weight_cache.quantize_weight_into", counted)
    return seen


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(E, N, K, generator=torch.Generator().manual_seed(1)))


class Problem:
    """An activation, a routing and an output gradient for weights `(E, N, K)`."""

    def __init__(self) -> None:
        self.a = torch.randn(sum(SIZES), K, requires_grad=True)
        self.offs = offsets(SIZES)
        self.dout = torch.randn(sum(SIZES), N)

    def forward(self, w: Tensor, cache: WeightCache | None, config: FP8Config | None = None) -> Tensor:
        config = FP8Config() if config is None else config
        return fp8moe.grouped_mm(self.a, w.transpose(-2, -1), self.offs, config=config, weight_cache=cache)

    def products(self, w: Tensor, cache: WeightCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and gradients of `a` and `w`."""
        out = self.forward(w, cache)
        da, dw = torch.autograd.grad(out, (self.a, w), self.dout)
        return out.detach(), da, dw

    def assert_fresh(self, w: Tensor, cache: WeightCache) -> None:
        for with_cache, without in zip(self.products(w, cache), self.products(w, None), strict=True):
            assert_same_bits(with_cache, without)

    def is_stale(self, w: Tensor, cache: WeightCache) -> bool:
        return not torch.equal(self.forward(w, cache), self.forward(w, None))


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("half", [1, 128, 200])
def test_operands_of_parts_are_those_of_separate_weights(split: Split, transposed: bool, half: int) -> None:
    w = torch.randn(2, 2 * half, 130)
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w
    parts = {
        Split.WHOLE: (w,), Split.HALVES: (w[:, :half], w[:, half:]), Split.INTERLEAVED: (w[:, ::2], w[:, 1::2])
    }[split]  # fmt: skip
    cache = WeightCache(w)
    for for_dgrad, quantize in ((False, quantize_weight_for_forward), (True, quantize_weight_for_dgrad)):
        expected = [quantize(part.contiguous(), ScaleFormat.FP32) for part in parts]
        along = 2 if for_dgrad else 1
        for operand in (
            quantize(w, ScaleFormat.FP32, split),
            quantize(parts, ScaleFormat.FP32),
            cache.operand(w, ScaleFormat.FP32, for_dgrad=for_dgrad, split=split),
        ):
            assert operand.data.shape[along] == split.padded(w.shape[1]) == sum(x.data.shape[along] for x in expected)
            data = torch.cat([x.data.view(torch.uint8) for x in expected], along)
            assert_same_bits(operand.data.view(torch.uint8), data)
            assert_same_bits(operand.scale, torch.cat([x.scale for x in expected], along))


@pytest.mark.parametrize("shape", [(3, 200, 130), (3, 1, 9)])
def test_weights_of_any_size(quantizations: list[Tensor], shape: tuple[int, int, int]) -> None:
    w = nn.Parameter(torch.randn(shape))
    cache, a = WeightCache(w), torch.randn(sum(SIZES), shape[2], requires_grad=True)

    def products(cache: WeightCache | None) -> tuple[Tensor, ...]:
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offsets(SIZES), weight_cache=cache)
        return out.detach(), *torch.autograd.grad(out, (a, w), torch.ones_like(out))

    for expected in (1, 1, 2):
        if expected == 2:
            w.data.mul_(-2)  # seen by its effect alone
        for cached, plain in zip(products(cache), products(None), strict=True):
            assert_same_bits(cached, plain)
        assert len(quantizations) == expected


def assert_saw_it(quantizations: list[Tensor], what: Callable[[], object], problem: Problem, w: Tensor) -> None:
    """After `what` happens to a weight that is cached, the results are new ones, and right."""
    cache = WeightCache(w)
    problem.assert_fresh(w, cache)
    before = problem.forward(w, None)
    assert len(quantizations) == 1
    what()
    assert sqnr(problem.forward(w, None), before) < 60  # it did change
    problem.assert_fresh(w, cache)
    problem.assert_fresh(w, cache)
    assert len(quantizations) == 2


@pytest.mark.parametrize("kind", [SGD, ADAM, ADAMW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_steps_of_any_optimizer(
    quantizations: list[Tensor], kind: Callable[..., torch.optim.Optimizer], options: dict[str, bool]
) -> None:
    problem, w = Problem(), parameter()
    optimizer = kind([w], lr=0.1, **options)
    w.grad = torch.randn_like(w)
    version = w._version
    assert_saw_it(quantizations, optimizer.step, problem, w)
    assert (w._version == version) == ("fused" in options)  # fused steps leave no trace there


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_a_compiled_optimizer_step(quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    optimizer = ADAM([w], lr=0.1)
    w.grad = torch.randn_like(w)
    torch.compiler.reset()
    assert_saw_it(quantizations, torch.compile(optimizer.step, backend="aot_eager"), problem, w)


def test_counted_writes_and_other_memory(quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()

    def in_place() -> None:
        with torch.no_grad():
            w.mul_(torch.randn(E, 1, 1))

    def other_memory() -> None:
        w.data = torch.randn_like(w)

    for change in (in_place, other_memory):
        quantizations.clear()
        assert_saw_it(quantizations, change, problem, w)


UNCOUNTED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "data": lambda w, other: w.data.copy_(other),
    "numpy": lambda w, other: np.copyto(w.detach().numpy(), other.numpy()),
    "dlpack": lambda w, other: torch.utils.dlpack.from_dlpack(w.detach()).copy_(other),
    "storage": lambda w, other: w.untyped_storage().copy_(other.untyped_storage()),
}


@pytest.mark.parametrize("how", UNCOUNTED)
def test_writes_that_nobody_counts(how: str, quantizations: list[Tensor]) -> None:
    """As by collectives, averages of weights that are swapped in and out, merged adapters."""
    problem, w = Problem(), parameter()
    cache, kept = WeightCache(w), w.detach().clone()
    problem.assert_fresh(w, cache)
    version = w._version
    for number, other in enumerate([torch.randn_like(w), kept, kept * 1.01]):
        UNCOUNTED[how](w, other)
        problem.assert_fresh(w, cache)
        problem.assert_fresh(w, cache)
        assert len(quantizations) == number + 2
    assert w._version == version


def test_one_expert_or_block_written_is_seen() -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    problem.assert_fresh(w, cache)
    for part in (np.s_[1], np.s_[2, :128], np.s_[0, 128:]):
        w.detach().numpy()[part] *= -1.5
        problem.assert_fresh(w, cache)


def test_a_single_element_may_be_missed_until_it_is_told() -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    problem.assert_fresh(w, cache)
    w.detach().numpy()[0, 1, 1] = 1e4  # beside what is sampled
    assert problem.is_stale(w, cache)
    cache.invalidate()
    problem.assert_fresh(w, cache)
    with torch.no_grad():
        w[0, 1, 1] = 1.0  # counted
    problem.assert_fresh(w, cache)
    w.detach().numpy()[0, 1, 1] = 1e4
    w.grad = torch.zeros_like(w)
    SGD([w], lr=0.1).step()  # a step that changes nothing
    problem.assert_fresh(w, cache)


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_over_microbatches(quantizations: list[Tensor], with_main_grad: bool, fused: bool) -> None:
    """Two steps of four microbatches: one quantization a step, and the very same training."""
    trained: list[list[Tensor]] = []
    for cached in (False, True):
        torch.manual_seed(5)
        w = parameter()
        cache = WeightCache(w) if cached else None
        main_grad = torch.zeros_like(w) if with_main_grad else None
        b_grad = None if main_grad is None else main_grad.transpose(-2, -1)
        optimizer = ADAM([w], lr=0.01, fused=fused)
        results = []
        for _ in range(2):
            for _ in range(4):
                problem = Problem()
                out = fp8moe.grouped_mm(
                    problem.a, w.transpose(-2, -1), problem.offs, main_grad=b_grad, weight_cache=cache
                )
                out.backward(problem.dout)
                assert problem.a.grad is not None
                results += [out.detach(), problem.a.grad]
            if main_grad is not None:
                assert w.grad is None
                w.grad = main_grad.clone()
                main_grad.zero_()
            assert w.grad is not None
            results.append(w.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
        trained.append([*results, w.detach()])
    for without, with_cache in zip(*trained, strict=True):
        assert_same_bits(with_cache, without)
    assert len(quantizations) == 2


def test_a_weight_changed_before_backward() -> None:
    """Refused if autograd knows; else the gradient is of the weight that forward used, or of the weight as it is."""
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    out = problem.forward(w, cache)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(problem.dout)
    of_forward = problem.products(w, None)[1]
    out, later = problem.forward(w, cache), problem.forward(w, cache)
    w.data.mul_(3)
    as_it_is = problem.products(w, None)[1]
    assert_same_bits(torch.autograd.grad(later, problem.a, problem.dout)[0], of_forward)
    assert_same_bits(torch.autograd.grad(out, problem.a, problem.dout)[0], as_it_is)


def test_two_forwards_before_two_backwards(quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    expected = problem.products(w, None)
    outs = [problem.forward(w, cache) for _ in range(2)]
    for out in outs:
        gradients = torch.autograd.grad(out, (problem.a, w), problem.dout)
        for gradient, other in zip(gradients, expected[1:], strict=True):
            assert_same_bits(gradient, other)
    assert len(quantizations) == 1


def test_scale_formats_do_not_mix() -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    for scale_format in (*ScaleFormat, *ScaleFormat):
        config = FP8Config(scale_format=scale_format)
        assert_same_bits(problem.forward(w, cache, config), problem.forward(w, None, config))


def test_a_parameter_stored_kn() -> None:
    problem, p = Problem(), nn.Parameter(torch.randn(E, K, N))
    cache = WeightCache(p.transpose(-2, -1))
    for _ in range(2):
        out = fp8moe.grouped_mm(problem.a, p, problem.offs, weight_cache=cache)
        assert_same_bits(out, fp8moe.grouped_mm(problem.a, p, problem.offs))
        p.data = torch.randn(E, K, N)
    p.data = torch.randn(E, N, K).transpose(1, 2)
    with pytest.raises(ValueError, match=r"the parameter of weight_cache has become .*: make a new WeightCache"):
        fp8moe.grouped_mm(problem.a, p, problem.offs, weight_cache=cache)


def test_one_group() -> None:
    w = nn.Parameter(torch.randn(1, N, K))
    a, offs = torch.randn(5, K), offsets([5])
    out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, weight_cache=WeightCache(w))
    assert_same_bits(out, fp8moe.grouped_mm(a, w.transpose(-2, -1), offs))


def test_another_weight_is_refused() -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    other_memory = r"weight_cache is of a weight .* pass b=w\.transpose\(-2, -1\) for weight_cache=WeightCache\(w\)"
    for wrong in (parameter(), w.bfloat16(), w.transpose(1, 2).contiguous().transpose(1, 2), w + 0):
        with pytest.raises(ValueError, match=other_memory):
            problem.forward(wrong, cache)
    problem.assert_fresh(w, cache)


def test_a_cache_that_nobody_keeps_is_missed_in_backward() -> None:
    problem, w = Problem(), parameter()
    out = problem.forward(w, WeightCache(w))
    with pytest.raises(RuntimeError, match=r"the WeightCache that forward used is gone, .* keep it for as long as"):
        out.backward(problem.dout)


def test_it_works_after_its_memory_could_not_be_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, w = Problem(), parameter()
    cache, empty = WeightCache(w), torch.empty

    def out_of_memory(*shape: Any, **options: Any) -> Tensor:
        if shape == ((E, K, N),):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            problem.forward(w, cache)
    problem.assert_fresh(w, cache)


def test_bad_arguments() -> None:
    problem, w = Problem(), parameter()
    with pytest.raises(TypeError, match=r"weight_cache is a bool; it must be None or a fp8moe\.WeightCache"):
        problem.forward(w, True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight is a list; it must be a torch\.Tensor"):
        WeightCache([])  # type: ignore[arg-type]
    for shape in ((N, K), (E, N, K, 1)):
        with pytest.raises(ValueError, match=r"weight has shape .*; it must be 3D, \(E, N, K\)"):
            WeightCache(torch.zeros(shape))


@pytest.mark.parametrize("frozen", ["w", "a"])
def test_frozen_inputs(frozen: str, quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    expected = problem.products(w, None)
    problem.a.requires_grad_(frozen == "w")
    w.requires_grad_(frozen == "a")
    cache = WeightCache(w)
    for _ in range(2):
        out = problem.forward(w, cache)
        out.backward(problem.dout)
    gradient, other = (w.grad, expected[2]) if frozen == "a" else (problem.a.grad, expected[1])
    assert gradient is not None
    assert_same_bits(out.detach(), expected[0])
    assert_same_bits(gradient, 2 * other)
    assert len(quantizations) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Callable[[], torch.no_grad], quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    with mode():
        for _ in range(3):
            assert_same_bits(problem.forward(w, cache), problem.forward(w, None))
        born_here = torch.randn(E, N, K)  # without a version counter
        cache_of_it = WeightCache(born_here)
        for _ in range(2):
            assert_same_bits(problem.forward(born_here, cache_of_it), problem.forward(born_here, None))
            born_here.mul_(-2)
    assert len(quantizations) == 3
    problem.assert_fresh(w, cache)


def test_autocast_and_checkpointing(quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    expected = problem.products(w, None)
    cache = WeightCache(w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(problem.forward(w, cache), expected[0].bfloat16())
    out = checkpoint(problem.forward, w, cache, use_reentrant=False)
    for gradient, other in zip(torch.autograd.grad(out, (problem.a, w), problem.dout), expected[1:], strict=True):
        assert_same_bits(gradient, other)
    assert len(quantizations) == 1


@pytest.mark.usefixtures("bf16_route")
def test_the_bf16_route_does_not_use_it(quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    problem.assert_fresh(w, WeightCache(w))
    assert quantizations == []


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_whole_and_sees_every_step(backend: str, fused: bool, quantizations: list[Tensor]) -> None:
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    optimizer = ADAMW([w], lr=0.01, fused=fused)

    def layer(a: Tensor, w: Tensor) -> Tensor:
        return fp8moe.grouped_mm(a * 1, w.transpose(-2, -1), problem.offs, weight_cache=cache)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for step in range(3):
        for microbatch in range(2):
            with torch.compiler.set_stance("default" if step == microbatch == 0 else "fail_on_recompile"):
                out = compiled(problem.a, w)
            da, w.grad = torch.autograd.grad(out, (problem.a, w), problem.dout)
            for actual, expected in zip((out.detach(), da, w.grad), problem.products(w, None), strict=True):
                assert_same_bits(actual, expected)
        optimizer.step()
    assert len(quantizations) == 3
    gradients = problem.products(w, None)[1:]
    outs = [compiled(problem.a, w) for _ in range(2)]  # two forwards before two backwards
    for out in outs:
        for actual, gradient in zip(torch.autograd.grad(out, (problem.a, w), problem.dout), gradients, strict=True):
            assert_same_bits(actual, gradient)
    with pytest.raises((ValueError, RuntimeError), match="weight_cache is of a weight"):
        compiled(problem.a, parameter())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
def test_copies_are_of_the_copied_weight(how: str, stored: str) -> None:
    problem, p = Problem(), parameter() if stored == "E,N,K" else nn.Parameter(torch.randn(E, K, N))

    def weight(p: Tensor) -> Tensor:
        return p if stored == "E,N,K" else p.transpose(1, 2)

    cache = WeightCache(weight(p))
    problem.assert_fresh(weight(p), cache)
    other, copied = copies(how, (p, cache))
    problem.assert_fresh(weight(other), copied)
    with torch.no_grad():
        other.mul_(torch.randn(E, 1, 1))
    problem.assert_fresh(weight(other), copied)
    problem.assert_fresh(weight(p), cache)
    with pytest.raises(ValueError, match="weight_cache is of a weight"):
        problem.forward(weight(p), copied)


def copies(how: str, x: tuple[nn.Parameter, WeightCache]) -> tuple[nn.Parameter, WeightCache]:
    if how == "deepcopy":
        return copy.deepcopy(x)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    loaded: tuple[nn.Parameter, WeightCache] = torch.load(buffer, weights_only=False)
    return loaded


def test_captured_graphs_ask_for_themselves(monkeypatch: pytest.MonkeyPatch, quantizations: list[Tensor]) -> None:
    """With the capture pretended: what it records is run as the replay."""
    problem, w = Problem(), parameter()
    cache = WeightCache(w)
    capturing = True
    monkeypatch.setattr(weight_cache, "is_being_captured", lambda x: capturing)
    with pytest.raises(RuntimeError, match="used for the first time while a CUDA graph is captured; run the captured"):
        problem.forward(w, cache)
    capturing = False
    problem.assert_fresh(w, cache)
    memory = [x.data_ptr() for x in cache._operands]
    capturing = True
    problem.assert_fresh(w, cache)  # fresh: the question is recorded, and answered with no
    assert len(quantizations) == 1
    w.data.mul_(2)
    problem.assert_fresh(w, cache)
    w.grad = torch.zeros_like(w)
    SGD([w], lr=0.1).step()
    problem.forward(w, cache)
    assert len(quantizations) == 3
    with torch.no_grad():
        w.mul_(3)
    for _ in range(2):  # stale: recorded is that it is quantized in any case, and nothing has run
        problem.forward(w, cache)
    assert len(quantizations) == 5
    capturing = False
    problem.forward(w, cache)
    assert len(quantizations) == 6
    problem.assert_fresh(w, cache)
    assert memory == [x.data_ptr() for x in cache._operands]


def layer(cache_weights: bool = True) -> SwiGLUExperts:
    torch.manual_seed(3)
    return SwiGLUExperts(4, 128, 256, cache_weights=cache_weights)


def experts_agree(cached: SwiGLUExperts) -> bool:
    """Whether `cached` computes what a module without caches does with the same parameters."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(60, 128, generator=generator)
    weights, ids = torch.randn(60, 4, generator=generator).softmax(-1).topk(2)
    plain = SwiGLUExperts(4, 128, 256)
    plain.load_state_dict(cached.state_dict())
    results = []
    for experts in (cached, plain):
        out = experts(hidden, ids, weights)
        results.append((out, *torch.autograd.grad(out.sum(), (experts.w_gate_up, experts.w_down))))
    return all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_experts_cache_their_parameters(quantizations: list[Tensor]) -> None:
    experts = layer()
    assert list(experts.state_dict()) == ["w_gate_up", "w_down"]
    assert "cache_weights=True" in repr(experts)
    assert experts_agree(experts)
    assert experts_agree(experts)
    assert len(quantizations) == 2
    assert experts_agree(layer(cache_weights=False))
    assert len(quantizations) == 2


@pytest.mark.parametrize("assign", [False, True])
def test_experts_load_other_parameters(assign: bool) -> None:
    experts = layer()
    assert experts_agree(experts)
    before = experts.w_down.detach().clone()
    experts.load_state_dict({name: torch.randn_like(x) for name, x in experts.state_dict().items()}, assign=assign)
    assert not torch.equal(experts.w_down, before)
    assert experts_agree(experts)


def test_experts_of_replaced_and_converted_parameters() -> None:
    experts = layer()
    assert experts_agree(experts)
    experts.w_down = nn.Parameter(torch.randn_like(experts.w_down))
    assert experts_agree(experts)
    experts.bfloat16().float()
    assert experts_agree(experts)
    on_meta = SwiGLUExperts(4, 128, 256, cache_weights=True, device="meta")
    on_meta.to_empty(device="cpu").reset_parameters()
    assert experts_agree(on_meta)


def test_experts_invalidate() -> None:
    experts = layer()
    assert experts_agree(experts)
    for parameter_ in experts.parameters():
        parameter_.detach().numpy()[0, 1, 1] = 1e3
    assert not experts_agree(experts)
    experts.invalidate_weight_cache()
    assert experts_agree(experts)


def test_weights_that_are_computed_anew_are_quantized_where_they_are_used() -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 0.5

    hidden, ids, weights = torch.randn(8, 128), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
    experts, plain = layer(), layer(cache_weights=False)
    before = experts(hidden, ids, weights)
    for module in (experts, plain):
        parametrize.register_parametrization(module, "w_down", Half())
    assert_same_bits(experts(hidden, ids, weights), plain(hidden, ids, weights))
    assert sqnr(experts(hidden, ids, weights), before / 2) > 100

    replica = layer()._replicate_for_data_parallel()  # as DataParallel makes it
    replica.w_gate_up, replica.w_down = (w.detach().clone() for w in layer().parameters())
    assert_same_bits(replica(hidden, ids, weights), before)


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about one rank
@pytest.mark.usefixtures("one_rank")
def test_sharded_weights_are_quantized_where_they_are_used() -> None:
    hidden, ids, weights = torch.randn(8, 128), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
    experts, plain = layer(), layer(cache_weights=False)
    plain_state = {name: value.clone() for name, value in plain.state_dict().items()}
    fully_shard(experts, mesh=init_device_mesh("cpu", (1,)))
    sharded_state = {name: value.detach().clone() for name, value in experts.state_dict().items()}
    with torch.no_grad():
        for factor in (1.0, 0.0, 1.0, 0.5):
            experts.load_state_dict({name: value * factor for name, value in sharded_state.items()})
            plain.load_state_dict({name: value * factor for name, value in plain_state.items()})
            assert_same_bits(experts(hidden, ids, weights), plain(hidden, ids, weights))
        for module in (experts, plain):
            module.w_down[0, 1, 1] = 1e3  # one element of the shard
        assert_same_bits(experts(hidden, ids, weights), plain(hidden, ids, weights))
    assert all(not cache._operands for cache in experts._weight_caches.values())


@pytest.mark.filterwarnings("error")
def test_a_copy_used_first_under_inference_mode_can_be_trained() -> None:
    experts = copy.deepcopy(layer())
    hidden, ids, weights = torch.randn(8, 128), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
    with torch.inference_mode():
        experts(hidden, ids, weights)
    experts(hidden, ids, weights).sum().backward()
    assert experts.w_down.grad is not None
    assert experts_agree(experts)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_experts_are_on_their_own(how: str) -> None:
    experts = layer()
    assert experts_agree(experts)
    if how == "deepcopy":
        other = copy.deepcopy(experts)
    else:
        buffer = io.BytesIO()
        torch.save(experts, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        other.w_down.mul_(torch.rand(4, 1, 1))
    assert experts_agree(other)
    assert experts_agree(experts)


def test_experts_are_freed_at_once() -> None:
    """No cycle of module and cache keeps a GPU's memory until the garbage collector comes by."""
    experts = layer()
    cache, gone = experts._weight_caches["w_down"], weakref.ref(experts)
    del experts
    assert gone() is None
    with pytest.raises(RuntimeError, match="the module whose w_down this WeightCache was of is gone"):
        cache.operand(torch.zeros(4, 128, 256), ScaleFormat.FP32, for_dgrad=False)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_layers_compiled_one_by_one_share_their_code() -> None:
    torch.compiler.reset()
    hidden = torch.randn(60, 128)
    weights, ids = torch.randn(60, 4).softmax(-1).topk(2)
    for number in range(3):
        experts = SwiGLUExperts(4, 128, 256, cache_weights=True)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            for _ in range(2):
                assert_same_bits(compiled(hidden, ids, weights), experts(hidden, ids, weights))
                experts.load_state_dict({k: v * 2 for k, v in experts.state_dict().items()}, assign=True)


@pytest.fixture(autouse=True)
def _no_caches_left() -> Iterator[None]:
    """Caches go when nobody holds them: an optimizer would refresh them for ever."""
    before = set(weight_source._sources)
    yield
    torch.compiler.reset()
    gc.collect()  # Dynamo leaves cycles behind
    assert set(weight_source._sources) <= before
