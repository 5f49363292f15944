"""The model: what it computes, whatever it has learned."""

import math

import pytest
import torch
from torch import nn

from fp8moe import SwiGLUExperts
from fp8moe.demo.experts import BF16Experts
from fp8moe.demo.model import MoE, MoELanguageModel, load_balancing_loss, rotate
from fp8moe.demo.settings import PRECISIONS, Precision

from .support import tiny_config

TINY = tiny_config()


def make_model(precision: Precision, trained: bool = True) -> MoELanguageModel:
    """A model; as if trained, its head is not zero."""
    torch.manual_seed(0)
    model = MoELanguageModel(TINY, precision)
    if trained:
        nn.init.normal_(model.head.weight, std=0.1)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_new_model_expects_every_byte_alike(precision: Precision) -> None:
    logits, balance = make_model(precision, trained=False)(torch.randint(256, (2, 16)))
    assert logits.shape == (2, 16, 256)
    assert logits.dtype == torch.float32
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(256, (32,)))
    assert loss.item() == pytest.approx(math.log(256))
    assert 1 <= balance.item() < TINY.experts


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-3), ("fp8", 5e-2)])
def test_no_logit_depends_on_a_later_byte(precision: Precision, tolerance: float) -> None:
    model = make_model(precision)
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 128) % 256
    difference = (model(tokens)[0] - model(changed)[0]).detach().abs().amax(dim=-1)[0]
    # Another byte moves rows between groups: the same sums in another order, whence the tolerance.
    assert difference[:20].max() < tolerance
    assert difference[20] > 20 * tolerance
    assert (difference[21:] > tolerance).any()


def test_precisions_share_parameters_and_differ_by_rounding() -> None:
    fp8, bf16 = (make_model(precision) for precision in PRECISIONS)
    assert isinstance(fp8.blocks[0].moe.experts, SwiGLUExperts)  # type: ignore[union-attr]
    assert isinstance(bf16.blocks[0].moe.experts, BF16Experts)  # type: ignore[union-attr]
    assert fp8.state_dict().keys() == bf16.state_dict().keys()
    for name, weight in fp8.state_dict().items():
        assert torch.equal(weight, bf16.state_dict()[name])
    tokens = torch.randint(256, (2, 32))
    expected, got = bf16(tokens)[0], fp8(tokens)[0]
    error = (got - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


def test_gradients_reach_every_parameter() -> None:
    for precision in PRECISIONS:
        model = make_model(precision)
        logits, balance = model(torch.randint(256, (4, 32)))
        (logits.square().mean() + balance).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.dtype == weight.dtype
            assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_under_autocast_experts_work_in_its_dtype_and_the_router_in_fp32(precision: Precision) -> None:
    model = make_model(precision)
    tokens = torch.randint(256, (2, 16))
    expected, _ = model(tokens)
    seen: list[torch.dtype] = []
    moe = model.blocks[0].moe
    assert isinstance(moe, MoE)
    moe.experts.register_forward_hook(lambda _, args, out: seen.extend((args[2].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, balance = model(tokens)
    (logits.square().mean() + balance).backward()
    assert seen == [torch.float32, torch.bfloat16]
    assert logits.dtype == balance.dtype == torch.float32
    assert (logits - expected).norm() < 0.1 * expected.norm()
    assert {weight.grad.dtype for weight in model.parameters() if weight.grad is not None} == {torch.float32}


def test_experts_that_are_alike_make_routing_irrelevant() -> None:
    """So the weights of a token's experts add up to 1."""
    torch.manual_seed(0)
    moe = MoE(TINY, "bf16")
    with torch.no_grad():
        for weight in (moe.experts.w_gate_up, moe.experts.w_down):
            weight.copy_(weight[:1].expand_as(weight))
        x = torch.randn(2, 8, TINY.hidden)
        y, _ = moe(x)
        moe.router.weight.copy_(torch.randn_like(moe.router.weight) * 10)
        other, _ = moe(x)
    assert y.norm() > 1
    assert (y - other).norm() < 0.02 * y.norm()


def test_a_dead_expert_is_never_chosen_and_learns_nothing() -> None:
    torch.manual_seed(0)
    moe = MoE(tiny_config(dead_experts=1), "fp8")
    x = torch.randn(2, 16, TINY.hidden)
    _, ids, _ = moe.router(x.flatten(0, 1))
    assert set(ids.unique().tolist()) == {1, 2, 3}
    y, balance = moe(x)
    (y.square().mean() + balance).backward()
    for weight in (moe.experts.w_gate_up, moe.experts.w_down):
        assert weight.grad is not None
        assert not weight.grad[0].any()
        assert weight.grad[1:].flatten(1).any(dim=1).all()
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.isfinite().all()


def test_gradients_of_the_baseline_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    experts = BF16Experts(4, 16, 16)
    ids, weights = torch.tensor([[0, 2], [2, 3], [3, 0]]), torch.rand(3, 2)
    grads = []
    for plain in (False, True):
        hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).bfloat16().float().requires_grad_()
        if plain:
            gate_up, down = experts.w_gate_up.bfloat16().float(), experts.w_down.bfloat16().float()
            gate, up = torch.einsum("th,tknh->tkn", hidden, gate_up[ids]).chunk(2, dim=-1)
            out = torch.einsum("tkn,tkhn->th", nn.functional.silu(gate) * up * weights[..., None], down[ids])
        else:
            out = experts(hidden, ids, weights)
        out.square().sum().backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


def test_load_balancing_loss_values() -> None:
    experts, tokens = 8, 64
    uniform = torch.full((tokens, experts), 1 / experts)
    even = torch.arange(2 * tokens).view(tokens, 2) % experts
    assert load_balancing_loss(uniform, even).item() == 1
    certain = torch.zeros(tokens, experts)
    certain[:, 3] = 1
    assert load_balancing_loss(certain, torch.full((tokens, 1), 3)).item() == experts
    # By hand: expert 0 gets 3 of 4 choices; mean probabilities 0.6 and 0.4.
    probs, ids = torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([[0, 0], [0, 1]])
    assert load_balancing_loss(probs, ids).item() == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))


def test_load_balancing_loss_moves_probability_from_busy_experts_to_idle_ones() -> None:
    logits = torch.zeros(10, 4, requires_grad=True)
    busy = torch.tensor([[0, 1]]).expand(10, 2)
    load_balancing_loss(logits.softmax(dim=-1), busy).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :2] > 0).all()
    assert (logits.grad[:, 2:] < 0).all()


def test_rotation_keeps_lengths_and_sees_distances_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 32)
    turned_q, turned_k = (rotate(x.expand(1, 1, 10, 32))[0, 0] for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(10))
    scores = turned_q @ turned_k.T
    for distance in (0, 3):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1
