"""What each rank asserts of FSDP2; see `cases.py`."""

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fp8moe
from fp8moe import FP8Config, Gate, ScaleFormat, SwiGLUExperts, WeightCache, grouped_mm
from fp8moe.autograd import experts
from fp8moe.distributed import ExpertParallelExperts, gather_in_fp8
from fp8moe.quantize.gathered import GatheredWeight
from tests.distributed.cases import Rank, expect, grad_of
from tests.measures import assert_same_bits, recording_saved_tensors, sqnr

H, I, E = 256, 128, 4  # noqa: E741
POW2 = FP8Config(scale_format=ScaleFormat.POW2)
Case = Callable[[Rank], None]


def only(count: int) -> Callable[[Case], Case]:
    """A case for so many ranks. All others are for two and for four."""

    def mark(case: Case) -> Case:
        case.counts = (count,)  # type: ignore[attr-defined]
        return case

    return mark


class Block(nn.Module):
    """A layer of experts behind a router."""

    def __init__(self, own: nn.Module, hidden: int, num_experts: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts, bias=False, dtype=dtype)
        self.experts = own

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).float().softmax(-1).topk(2)
        return x + self.experts(x, ids, weights)


def build(
    num_experts: int = E, hidden: int = H, intermediate: int = I, config: FP8Config = POW2, layers: int = 2,
    dtype: torch.dtype = torch.float32, cache_weights: bool = False,
) -> Any:  # fmt: skip
    """The same on each rank."""
    torch.manual_seed(1)
    model = nn.Sequential()
    for _ in range(layers):
        own = SwiGLUExperts(num_experts, hidden, intermediate, config, dtype=dtype, cache_weights=cache_weights)
        model.append(Block(own, hidden, num_experts, dtype))
    return model


def mesh_of(rank: Rank) -> DeviceMesh:
    return init_device_mesh("cpu", (rank.count,))


def shard(model: Any, mesh: DeviceMesh, dim: int = 0, **options: Any) -> Any:
    """As one does: layer by layer, and what is left."""
    if dim:
        options["shard_placement_fn"] = lambda parameter: Shard(dim if parameter.dim() == 3 else 0)
    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def in_fp8(model: Any, mesh: DeviceMesh, dim: int = 0, **options: Any) -> Any:
    sharded = shard(model, mesh, dim, **options)
    expect(gather_in_fp8(sharded) == 2 * len(model))
    return sharded


def tokens(rank: Rank, step: int, hidden: int = H, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank.number)
    return torch.randn(40, hidden, dtype=dtype, generator=generator, requires_grad=True)


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Forward and backward; what came of it on this rank."""
    out = model(x)
    out.square().mean().backward()
    gradients = {name: local(grad_of(p)).clone() for name, p in model.named_parameters()}
    return {"out": out.detach(), "x": grad_of(x), **gradients}


def train(model: nn.Module, rank: Rank, steps: int = 2, hidden: int = H, **options: Any) -> list[dict[str, Tensor]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    found = []
    for number in range(steps):
        found.append(step(model, tokens(rank, number, hidden)))
        optimizer.step()
        optimizer.zero_grad()
    return [*found, {name: local(p.detach()).clone() for name, p in model.named_parameters()}]


def same(actual: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]], words: object = "") -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        expect(one.keys() == other.keys(), words)
        for name, value in other.items():
            try:
                assert_same_bits(one[name], value)
            except AssertionError as error:
                expect(False, f"{words}: {number}, {name}: {error}")
    expect(all(value.any() for name, value in expected[0].items() if value.numel()), f"{words}: zeros")


def sources(model: nn.Module) -> Iterator[Any]:
    """Of the weights that are gathered in FP8."""
    for parameter in model.parameters():
        hook = getattr(getattr(parameter, "_local_tensor", None), "fsdp_pre_all_gather", None)
        if hook is not None:
            yield hook.__wrapped__.__self__.source


def case_the_bits_are_those_of_a_gather_in_high_precision(rank: Rank) -> None:
    mesh = mesh_of(rank)
    ways: list[tuple[dict[str, Any], FP8Config]] = [
        ({}, FP8Config(keep_quantized_weights=True)),
        ({"reshard_after_forward": False}, POW2),
        ({"dim": 1}, FP8Config()),
        ({"dim": 2, "reshard_after_forward": False}, POW2),
    ]
    for way, config in ways[:: rank.count // 2]:
        expected = train(shard(build(config=config), mesh, **way), rank)
        same(train(in_fp8(build(config=config), mesh, **way), rank), expected, (way, config.scale_format))


@only(1)
def case_one_rank_gathers_nothing(rank: Rank) -> None:
    """FSDP then copies the first of what it would gather, and no more."""
    for dim, options in product((0, 1), ({}, {"reshard_after_forward": False})):
        plain, model = (way(build(), mesh_of(rank), dim, **options) for way in (shard, in_fp8))
        same(train(model, rank), train(plain, rank), (dim, options))


def case_sizes_that_do_not_divide(rank: Rank) -> None:
    """Experts over ranks (there may be fewer than ranks), and features over blocks, gate and up each."""
    mesh = mesh_of(rank)
    for num_experts, hidden, intermediate in ((3, 128, 128), (5, 72, 200), (2, 128, 64)):
        model = partial(build, num_experts, hidden, intermediate, layers=1)
        expected = train(shard(model(), mesh), rank, 2, hidden)
        same(train(in_fp8(model(), mesh), rank, 2, hidden), expected, (num_experts, hidden, intermediate))


def case_the_output_is_that_of_the_layer_alone(rank: Rank) -> None:
    x = tokens(rank, 0)
    for config, dim in product((FP8Config(), POW2), (0, 1, 2)):
        alone = build(config=config)
        with torch.no_grad():
            for block in alone:
                block.experts.w_gate_up[0, 100] *= 100  # the maximum of a block lies on one rank alone
                block.experts.w_down[1, :, 20] *= 100
        model = in_fp8(copy.deepcopy(alone), mesh_of(rank), dim)
        assert_same_bits_noted(model(x), alone(x))


def assert_same_bits_noted(actual: Tensor, expected: Tensor, words: object = "") -> None:
    same([{"": actual.detach()}], [{"": expected.detach()}], words)


def case_blocks_that_are_not_finite_are_nan_on_all_ranks(rank: Rank) -> None:
    x = tokens(rank, 0)
    for dim, value in product((0, 1, 2), (float("nan"), float("inf"))):
        alone = build(layers=1)
        with torch.no_grad():
            alone[0].experts.w_gate_up[1, 5, 7] = value
        expected = alone(x)
        expect(expected.isnan().any() and not expected.isnan().all())
        actual = in_fp8(copy.deepcopy(alone), mesh_of(rank), dim)(x)
        expect(torch.equal(actual.isnan(), expected.isnan()), (dim, value))
        assert_same_bits_noted(actual.nan_to_num(0.0), expected.nan_to_num(0.0), (dim, value))


@only(2)
def case_the_experts_compute_in_fp8_whatever_auto_takes(rank: Rank) -> None:
    own: Any = getattr(experts, "backends_for")  # noqa: B009 (it is imported there)

    def as_if_bf16_were_faster(config: FP8Config, *args: Any, **options: Any) -> Any:
        return None if config.allow_bf16 else own(config, *args, **options)

    expected = train(shard(build(), mesh_of(rank)), rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "backends_for", as_if_bf16_were_faster)
        same(train(in_fp8(build(), mesh_of(rank)), rank), expected)
        in_bf16 = train(shard(build(), mesh_of(rank)), rank)
    expect(not torch.equal(in_bf16[0]["out"], expected[0]["out"]))


def case_mixed_precision_quantizes_the_weights_as_they_are_stored(rank: Rank) -> None:
    """From fp32, without the rounding to bf16 that a gather in bf16 has before it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dim in (0, 1):
        alone, model = build(layers=1), in_fp8(build(layers=1), mesh_of(rank), dim, mp_policy=policy)
        x = tokens(rank, 0).detach().bfloat16()
        weights, ids = nn.functional.linear(x, alone[0].router.weight.bfloat16()).float().softmax(-1).topk(2)
        assert_same_bits_noted(model(x), x + alone[0].experts(x, ids, weights))
        in_bf16 = step(shard(build(layers=1), mesh_of(rank), dim, mp_policy=policy), tokens(rank, 0))
        found = step(model, tokens(rank, 0))
        for name, expected in in_bf16.items():
            expect(found[name].dtype is expected.dtype, name)
            expect(sqnr(found[name], expected) > 25, (name, sqnr(found[name], expected)))


def case_half_of_the_bytes_travel(rank: Rank) -> None:
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13

    class Counting:
        """FSDP's own all-gather."""

        def __init__(self) -> None:
            self.sizes: list[int] = []

        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
            self.sizes.append(input_tensor.nbytes)
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)

    found = []
    for way in (shard, in_fp8):
        model = way(build(8, dtype=torch.bfloat16, layers=1), mesh_of(rank))
        counted = Counting()
        model[0].set_custom_all_gather(counted)
        model(tokens(rank, 0, dtype=torch.bfloat16)).sum().backward()
        found.append(counted.sizes)
    router, weights = 2 * 8 * H // rank.count, 8 * 3 * I * H // rank.count
    expect(found[0] == 2 * [router + 2 * weights], found)
    expect(found[1] == 2 * [router + weights + weights // 128**2 * 4], found)


def case_the_gathered_memory_is_freed(rank: Rank) -> None:
    model = in_fp8(build(), mesh_of(rank))
    with recording_saved_tensors() as saved:
        out = model(tokens(rank, 0))
    memory = [source._codes.untyped_storage() for source in sources(model)]
    expect(len(memory) == 4 and all(not storage.size() for storage in memory[:2]))
    expect(not any(isinstance(x, GatheredWeight) for x in saved))
    with torch.autograd.graph.save_on_cpu():  # hooks that move what is saved
        moved = model(tokens(rank, 0))
    moved.sum().backward()
    gradients = [local(grad_of(p)).clone() for p in model.parameters()]
    model.zero_grad()
    out.sum().backward()
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        assert_same_bits_noted(local(grad_of(parameter)), expected)
    expect(all(not storage.size() for storage in memory))


@only(2)
def case_checkpointed_layers_use_both_operands_in_backward(rank: Rank) -> None:
    def checkpointed(model: Any, outside: bool) -> Any:
        if outside:
            return nn.Sequential(*[checkpoint_wrapper(layer) for layer in model])
        for layer in model:
            layer.experts = checkpoint_wrapper(layer.experts, context_fn=save_products)
        return model

    def save_products() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.fp8moe.m_grouped_cached.default])

    mesh = mesh_of(rank)
    for outside, dim in ((True, 0), (False, 0), (True, 1)):
        expected = train(shard(checkpointed(build(), outside), mesh, dim), rank)
        same(train(in_fp8(checkpointed(build(), outside), mesh, dim), rank), expected, (outside, dim))
    sharded_inside = build()
    for layer in sharded_inside:
        fully_shard(layer, mesh=mesh)
    gather_in_fp8(sharded_inside)
    outer = nn.Sequential(*[checkpoint_wrapper(layer) for layer in sharded_inside])
    expected = train(shard(build(), mesh), rank)
    same(
        [{k.replace("_checkpoint_wrapped_module.", ""): v for k, v in x.items()} for x in train(outer, rank)], expected
    )


@only(2)
def case_layers_compiled_one_by_one(rank: Rank) -> None:
    """Whole layers, which share their code, and experts alone."""

    def compiled(model: Any, whole: bool) -> Any:
        if not whole:
            model[0].experts.compile(backend="aot_eager", fullgraph=True)
            return model
        layers: list[Any] = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in model]
        return nn.Sequential(*layers)

    mesh = mesh_of(rank)
    torch.compiler.reset()
    with warnings.catch_warnings(action="ignore"):  # Dynamo warns of what it does itself
        for whole in (True, False):
            expected = train(shard(compiled(build(), whole), mesh), rank)
            counters.clear()
            model = in_fp8(compiled(build(), whole), mesh, reshard_after_forward=whole)
            same(train(model, rank), expected, whole)
            expect(counters["stats"]["unique_graphs"] == 1, dict(counters["stats"]))


@only(2)
def case_accumulation_without_sync(rank: Rank) -> None:
    def accumulate(model: Any) -> list[dict[str, Tensor]]:
        for number in range(3):
            model.set_requires_gradient_sync(number == 2)
            model.set_reshard_after_backward(number == 2)
            out = model(tokens(rank, number))
            out.square().mean().backward()
        return [{name: local(grad_of(p)) for name, p in model.named_parameters()}]

    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    for options in ({}, {"mp_policy": policy}, {"reshard_after_forward": False}):
        expected = accumulate(shard(build(layers=1), mesh_of(rank), **options))
        same(accumulate(in_fp8(build(layers=1), mesh_of(rank), **options)), expected, options)


@contextmanager
def counted_quantizations() -> Iterator[list[Tensor]]:
    from fp8moe.quantize import weight_cache

    found: list[Tensor] = []
    own: Any = getattr(weight_cache, "quantize_weight_into")  # noqa: B009 (it is imported there)

    def counted(w: Tensor, *args: Any, **options: Any) -> None:
        changed = args[4] if len(args) > 4 else None
        if changed is None or changed.any():
            found.append(w)
        own(w, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_cache, "quantize_weight_into", counted)
        yield found


def case_shards_are_quantized_when_they_change(rank: Rank) -> None:
    mesh = mesh_of(rank)
    plain, model = shard(build(), mesh), in_fp8(build(), mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, model)]

    def agree(words: str) -> int:
        with counted_quantizations() as found:
            same([step(model, tokens(rank, 0))], [step(plain, tokens(rank, 0))], words)
        return len(found)

    expect(agree("first") == 4)
    expect(agree("again") == 0)
    for optimizer in optimizers:
        optimizer.step()
    expect(agree("after a step") == 4)
    for m in (plain, model):
        with torch.no_grad():
            m[0].experts.w_down.mul_(2)
    expect(agree("written") == 1)
    for m in (plain, model):
        local(m[1].experts.w_gate_up).data.normal_(generator=torch.Generator().manual_seed(rank.number))
    expect(agree("written past the counter") == 1)
    if rank.number == 0:
        for m in (plain, model):
            with torch.no_grad():
                local(m[0].experts.w_gate_up)[0, 0, 0] = 3.0
    expect(agree("on one rank alone") == (rank.number == 0))
    state = {name: value.detach().clone() * 0.5 for name, value in plain.state_dict().items()}
    for m in (plain, model):
        m.load_state_dict(state)
    expect(agree("loaded") == 4)
    for m in (plain, model):
        m.load_state_dict({name: value.clone() * 2 for name, value in state.items()}, assign=True)
    expect(agree("assigned") == 4)
    expect(len(list(sources(model))) == 4)


def case_shards_of_features_are_never_stale(rank: Rank) -> None:
    plain, model = shard(build(layers=1), mesh_of(rank), 1), in_fp8(build(layers=1), mesh_of(rank), 1)
    for number in range(3):
        same([step(model, tokens(rank, 0))], [step(plain, tokens(rank, 0))], number)
        for m in (plain, model):
            if rank.number == number % rank.count:
                local(m[0].experts.w_gate_up.data)[1, 3] = 5.0 + number


@only(2)
def case_optimizers_and_clipping(rank: Rank) -> None:
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        expected = train(shard(build(layers=1), mesh_of(rank)), rank, **options)
        same(train(in_fp8(build(layers=1), mesh_of(rank)), rank, **options), expected, options)
    norms = []
    for way in (shard, in_fp8):
        model = way(build(layers=1), mesh_of(rank))
        model(tokens(rank, 0)).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms.append(
            {
                "norm": norm.full_tensor() if isinstance(norm, DTensor) else norm,
                **{n: local(grad_of(p)) for n, p in model.named_parameters()},
            }
        )
    same(norms[1:], norms[:1])


def case_state_dicts_are_plain(rank: Rank) -> None:
    model, mesh = in_fp8(build(), mesh_of(rank)), mesh_of(rank)
    plain = shard(build(), mesh)
    for _ in range(2):  # before and after a forward
        found: Any
        for found in (model.state_dict(), get_model_state_dict(model)):
            expect(list(found) == list(plain.state_dict()))
            for name, expected in plain.state_dict().items():
                value = found[name]
                expect(type(value) is DTensor and type(local(value)) is Tensor, name)
                expect(not vars(value.to_local()) and value.placements == expected.placements, name)
                assert_same_bits_noted(local(value), local(expected), name)
        full = {name: value.full_tensor() for name, value in model.state_dict().items()}
        buffer = io.BytesIO()
        torch.save(full, buffer)
        expect(b"fp8moe" not in buffer.getvalue())
        model(tokens(rank, 0)).sum().backward()
    expect(copy.deepcopy(model[0].experts.w_down._local_tensor).fsdp_pre_all_gather is None)
    alone = build()
    alone.load_state_dict(full)


@only(2)
def case_copies_of_parameters_take_their_place(rank: Rank) -> None:
    """A copied tensor carries what FSDP must not call."""
    for dim in (0, 1):
        plain, model = shard(build(layers=1), mesh_of(rank), dim), in_fp8(build(layers=1), mesh_of(rank), dim)
        for number in range(2):  # before and after a forward
            for m in (plain, model):
                m.zero_grad()
                m.load_state_dict(copy.deepcopy(m.state_dict(keep_vars=True)), assign=True)
            same([step(model, tokens(rank, number))], [step(plain, tokens(rank, number))], number)
            expect(len(list(sources(model))) == 2, dim)


def case_checkpoints_of_two_ranks_in_all(rank: Rank) -> None:
    """`torch.distributed.checkpoint`, of weights and of the optimizer."""
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    two = DeviceMesh("cpu", [0, 1])
    expected = []
    if rank.number < 2:
        model = in_fp8(build(), two)
        train(model, Rank(rank.number, 2))
        save(get_model_state_dict(model), checkpoint_id=folders[0], process_group=two.get_group())
        expected = [{name: value.full_tensor() for name, value in model.state_dict().items()}]
    dist.barrier()
    model = in_fp8(build(), mesh_of(rank))
    model(tokens(rank, 0))
    state = get_model_state_dict(model)
    load(state, checkpoint_id=folders[0])
    set_model_state_dict(model, state)
    found = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if expected:
        same([found], expected)
    alone = build()
    alone.load_state_dict(found)
    assert_same_bits_noted(model(tokens(rank, 1)), alone(tokens(rank, 1)))


@only(2)
def case_made_on_the_meta_device(rank: Rank) -> None:
    for early in (True, False):
        results = []
        for way in (shard, in_fp8):
            with torch.device("meta"):
                model = build(layers=1)
            shard(model, mesh_of(rank))
            if way is in_fp8 and early:
                gather_in_fp8(model)
            model.to_empty(device="cpu")
            generator = torch.Generator().manual_seed(rank.number)
            for parameter in model.parameters():
                local(parameter.data).normal_(std=0.05, generator=generator)
            if way is in_fp8 and not early:
                gather_in_fp8(model)
            expect(len(list(sources(model))) == (2 if way is in_fp8 else 0))
            results.append(train(model, rank))
        same(results[1], results[0], early)


@only(2)
def case_caches_of_modules_hold_nothing(rank: Rank) -> None:
    for way in (shard, in_fp8):
        model = way(build(cache_weights=True, layers=1), mesh_of(rank))
        same(train(model, rank), train(shard(build(layers=1), mesh_of(rank)), rank))
        for layer in model:
            expect(all(not cache._operands for cache in layer.experts._weight_caches.values()))
    for parameter in model[0].experts.parameters():
        stored = parameter._local_tensor
        held = stored.fsdp_pre_all_gather.__wrapped__.__self__._cache._operands
        expect(sum(x.nbytes for x in held if x.itemsize == 1) == 2 * stored.numel())


@only(2)
def case_inference(rank: Rank) -> None:
    alone, model = build(), in_fp8(build(), mesh_of(rank))
    with torch.no_grad():
        assert_same_bits_noted(model(tokens(rank, 0)), alone(tokens(rank, 0)))
    same(train(model, rank), train(shard(build(), mesh_of(rank)), rank))


class Functional(nn.Module):
    """Experts that call `moe_forward` in their own way."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], call: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(E, *shape) / 16))
        self.call = call

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.call(self, x, ids, weights)


def functional(shapes: dict[str, tuple[int, ...]], call: Callable[..., Tensor]) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(Block(Functional(shapes, call), H, E))


def case_weights_in_any_form(rank: Rank) -> None:
    """Pairs, stored transposed, by turns, biases, other gates, features that fill no blocks."""
    names, relu = {"gate_up": "w", "down": "d"}, Gate.relu_squared()
    for i in (128, 72) if rank.count == 2 else (128,):
        forms: dict[str, tuple[dict[str, tuple[int, ...]], Callable[..., Tensor], dict[str, Any]]] = {
            "pair": (
                {"g": (i, H), "u": (i, H), "d": (H, i)},
                lambda m, x, ids, weights: fp8moe.moe_forward(x, ids, weights, (m.g, m.u), m.d),
                {"gate_up": ("g", "u"), "down": "d"},
            ),
            "transposed": (
                {"w": (H, 2 * i), "d": (i, H)},
                lambda m, x, ids, weights: fp8moe.moe_forward(
                    x, ids, weights, m.w.transpose(1, 2), m.d.transpose(-1, -2)
                ),
                {**names, "stored_transposed": True},
            ),
            "gpt-oss": (
                {"w": (H, 2 * i), "b": (2 * i,), "d": (i, H), "c": (H,)},
                lambda m, x, ids, weights: fp8moe.moe_forward(
                    x,
                    ids,
                    weights,
                    m.w.transpose(1, 2),
                    m.d.transpose(1, 2),
                    biases=(m.b, m.c),
                    interleaved=True,
                    config=POW2,
                ),
                {**names, "stored_transposed": True, "interleaved": True, "config": POW2},
            ),
            "no gate": (
                {"w": (i, H), "d": (H, i)},
                lambda m, x, ids, weights: fp8moe.moe_forward(x, ids, weights, m.w, m.d, gate=relu),
                {**names, "gate": relu},
            ),
        }
        for name, (shapes, call, options) in forms.items():
            for dim in (0, rank.count // 2):
                whole_blocks = i == 128 and name != "gpt-oss"
                model = shard(functional(shapes, call), mesh_of(rank), dim if name != "gpt-oss" else 0)
                if dim and not whole_blocks:
                    if name != "gpt-oss":
                        with pytest.raises(ValueError, match=r"sharded in its dimension .: .* multiples of 128"):
                            gather_in_fp8(model[0].experts, **options)
                    continue
                expect(gather_in_fp8(model[0].experts, **options) == len([s for s in shapes.values() if len(s) == 2]))
                expected = train(shard(functional(shapes, call), mesh_of(rank), dim), rank, 1)
                same(train(model, rank, 1), expected, (name, i, dim))


@only(4)
def case_with_expert_parallelism(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))

    def layer() -> Any:
        torch.manual_seed(1 + mesh["ep"].get_local_rank())
        block = Block(ExpertParallelExperts(8, H, I, mesh["ep"], config=POW2), H, 8)
        torch.manual_seed(5)
        nn.init.normal_(block.router.weight)
        return nn.Sequential(block)

    expected = train(shard(layer(), mesh["fsdp"]), rank)
    same(train(in_fp8(layer(), mesh["fsdp"]), rank), expected)
    alone = layer()
    assert_same_bits_noted(in_fp8(layer(), mesh["fsdp"])(tokens(rank, 0)), alone(tokens(rank, 0)))


@only(4)
def case_parameters_that_are_sharded_by_experts_already(rank: Rank) -> None:
    """As torchtitan has them: DTensors of the mesh of the experts, of which each rank takes its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))

    def call(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up, down = (local(w) for w in (module.g, module.u, module.d))
        return fp8moe.moe_forward(x, ids - len(down) * mesh["ep"].get_local_rank(), weights, (gate, up), down)

    def layer() -> Any:
        model = functional({"g": (I, H), "u": (I, H), "d": (H, I)}, call)
        for name, parameter in list(model[0].experts.named_parameters()):
            setattr(model[0].experts, name, nn.Parameter(distribute_tensor(parameter.data, mesh["ep"], [Shard(0)])))
        fully_shard(model[0].experts, mesh=mesh["fsdp"])
        return model

    expected = train(layer(), rank, foreach=False)
    model = layer()
    expect(gather_in_fp8(model[0].experts, ("g", "u"), "d") == 3)
    same(train(model, rank, foreach=False), expected)


@only(2)
def case_models_of_transformers(rank: Rank) -> None:
    if find_spec("transformers") is None:
        return
    from fp8moe.integrations.transformers import gather_in_fp8 as gather_experts_in_fp8
    from tests.integrations.transformers_support import batch
    from tests.integrations.transformers_support import build as build_model

    def model_of(name: str, **options: Any) -> Any:
        model = build_model(name, intermediate_size=256, **options)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh_of(rank))
        return fully_shard(model, mesh=mesh_of(rank)).train()

    def steps(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for number in range(3):
            loss = model(batch(2 * number + rank.number), labels=batch(2 * number + rank.number)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    with warnings.catch_warnings(action="ignore"):  # of transformers
        expected, model = steps(model_of("Qwen3Moe")), model_of("Qwen3Moe")
        expect(gather_experts_in_fp8(model) == len(model.model.layers))
        expect(steps(model) == expected, expected)
        # Stored transposed, gate and up by turns, biases, another gate.
        expected_gpt, model = steps(model_of("GptOss")), model_of("GptOss")
        expect(gather_experts_in_fp8(model) == len(model.model.layers))
        expect(steps(model) == expected_gpt, expected_gpt)
        with pytest.raises(ValueError, match="model has no experts that fp8moe computes: load it with"):
            gather_experts_in_fp8(nn.Linear(2, 2))
        expect(expected[-1] < expected[0])


def case_replicas_of_shards(rank: Rank) -> None:
    """HSDP; and one rank, which has all."""
    if rank.count == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        same(train(in_fp8(build(), mesh), rank), train(shard(build(), mesh), rank))
    for dim in (0, 1):
        ones = init_device_mesh("cpu", (rank.count, 1), mesh_dim_names=("other", "one"))["one"]
        same(train(in_fp8(build(), ones, dim), rank), train(shard(build(), ones, dim), rank), dim)


def case_what_asks_for_values_is_told(rank: Rank) -> None:
    model = in_fp8(build(layers=1), mesh_of(rank))
    model[0].unshard()
    w, down = model[0].experts.w_gate_up, model[0].experts.w_down
    expect(type(w) is GatheredWeight and w.shape == (E, 2 * I, H) and w.dtype is torch.float32 and "in FP8" in str(w))
    for use in (
        lambda: w + 1,
        lambda: w.bfloat16(),
        lambda: w.sum(),
        lambda: w[0],
        lambda: w.transpose(0, 1),
        lambda: w.detach().copy_(w),
    ):
        with pytest.raises(RuntimeError, match="of a weight that FSDP gathers in FP8"):
            use()
    expect(type(torch.zeros_like(w)) is Tensor)  # FSDP's gradient of a weight that was not used
    x, ids, weights = torch.randn(8, H), torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1)
    offs = torch.tensor([8] * E, dtype=torch.int32)

    def wrong(error: type[Exception], message: str, **options: Any) -> None:
        arguments = {"w_gate_up": w, "w_down": down, "config": POW2, **options}
        with pytest.raises(error, match=message):
            fp8moe.moe_forward(x, ids, weights, **arguments)

    expect(fp8moe.moe_forward(x, ids, weights, w, down, config=POW2).any())
    with pytest.raises(TypeError, match="b is gathered in FP8, which grouped_mm does not take"):
        grouped_mm(x, w.transpose(1, 2), offs)
    wrong(ValueError, "gathered in FP8 with scale_format ScaleFormat.POW2, and the experts take", config=FP8Config())
    wrong(ValueError, "gathered in FP8 with split Split.HALVES", interleaved=True)
    wrong(ValueError, r"weight_caches\[1\] is of a weight that is gathered", weight_caches=(None, WeightCache(x[None])))
    wrong(ValueError, r"main_grads\[0\] is of a weight of FSDP", main_grads=(torch.zeros(E, 2 * I, H), None))
    square = in_fp8(build(hidden=I, layers=1), mesh_of(rank))
    square[0].unshard()
    other, part = square[0].experts.w_gate_up, square[0].experts.w_down  # (E, 2I, I), (E, I, I)
    with pytest.raises(ValueError, match="w_down is the transpose of what it is gathered as"):
        fp8moe.moe_forward(x[:, :I], ids, weights, other, part.transpose(1, 2), config=POW2)
    for pair in ((part, torch.randn(E, I, I)), (torch.randn(E, I, I), part), (part, part)):
        with pytest.raises(ValueError, match="w_gate_up is a pair that is not gathered in FP8 as one"):
            fp8moe.moe_forward(x[:, :I], ids, weights, pair, part, config=POW2)
    model[0].reshard()
    with pytest.raises(RuntimeError, match="used while FSDP has it sharded"):
        fp8moe.moe_forward(x, ids, weights, w, down, config=POW2)


def case_what_cannot_be_gathered_is_refused(rank: Rank) -> None:
    def wrong(error: type[Exception], message: str, module: Any, *names: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            gather_in_fp8(module, *names, **options)

    mesh, sharded = mesh_of(rank), shard(build(), mesh_of(rank))
    wrong(ValueError, "w_gate_up is not sharded by FSDP2: call fully_shard first", build())
    wrong(ValueError, "has no SwiGLUExperts", nn.Linear(3, 3))
    wrong(TypeError, "module is a int", 3)
    wrong(TypeError, "given both, or neither", sharded, "w_gate_up")
    wrong(ValueError, "Block.gate is not sharded by FSDP2", sharded[0], "gate", "up")
    wrong(TypeError, r"router.weight|weight is torch.float32 \(4, 256\)", sharded[0].router, "weight", "weight")
    wrong(TypeError, "config is 3", sharded[0].experts, "w_gate_up", "w_down", config=3)
    wrong(TypeError, "gate is 3", sharded[0].experts, "w_gate_up", "w_down", gate=3)
    offloaded = shard(build(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    wrong(ValueError, "is offloaded to the CPU", offloaded)
    if rank.count == 4:
        wrong(ValueError, "resharded to a smaller mesh", shard(build(), mesh, reshard_after_forward=2))
    wrong(ValueError, "interleaved and sharded in its dimension 1",
          shard(build(), mesh, 1)[0].experts, "w_gate_up", "w_down", interleaved=True)  # fmt: skip
    sharded(tokens(rank, 0))
    wrong(ValueError, "has been gathered in high precision: call gather_in_fp8 before", sharded)
    wrong(ValueError, "in its own way already: call gather_in_fp8 once", in_fp8(build(), mesh))
    expect(isinstance(sharded, FSDPModule) and Path(__file__).exists())


CASES: dict[str, Case] = {
    name.removeprefix("case_"): function for name, function in list(globals().items()) if name.startswith("case_")
}
