"""`SwiGLUExperts` against a loop over tokens and their choices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fp8moe
from fp8moe import SwiGLUExperts
from tests.measures import assert_same_bits, sqnr


def by_loop(experts: SwiGLUExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """fp32, one token and one choice at a time."""
    rows = []
    for token in range(hidden.shape[0]):
        row = torch.zeros(hidden.shape[1])
        for choice in range(ids.shape[1]):
            expert = int(ids[token, choice])
            if 0 <= expert < experts.num_experts:
                gate, up = (experts.w_gate_up[expert].float() @ hidden[token].float()).chunk(2)
                row = row + weights[token, choice] * (experts.w_down[expert].float() @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def layer(dtype: torch.dtype = torch.float32) -> tuple[SwiGLUExperts, Tensor, Tensor, Tensor]:
    experts = SwiGLUExperts(4, 128, 256, dtype=dtype)
    hidden = torch.randn(60, 128, dtype=dtype, requires_grad=True)
    logits = torch.randn(60, 4)
    logits[:, 2] = -torch.inf  # an expert without tokens
    weights, ids = logits.softmax(-1).topk(2)
    return experts, hidden, ids, weights.requires_grad_()


def test_equals_a_loop_over_tokens() -> None:
    experts, hidden, ids, weights = layer()
    dout = torch.randn(60, 128)
    inputs = (hidden, weights, experts.w_gate_up, experts.w_down)
    expected = by_loop(experts, hidden, ids, weights)
    expected_gradients = torch.autograd.grad(expected, inputs, dout)
    actual = experts(hidden, ids, weights)
    gradients = torch.autograd.grad(actual, inputs, dout)
    assert sqnr(actual, expected) >= 23
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert sqnr(gradient, exact) >= 22.5
    assert (gradients[2][2] == 0).all()
    assert (gradients[3][2] == 0).all()


def test_choices_of_no_expert_add_nothing() -> None:
    experts, hidden, ids, weights = layer()
    dropped = torch.where(torch.rand(60, 2) < 0.3, torch.tensor([-1, 4])[torch.randint(2, (60, 2))], ids)
    dropped[0] = -1
    out = experts(hidden, dropped, weights)
    assert sqnr(out, by_loop(experts, hidden, dropped, weights)) >= 23
    assert (out[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    experts, hidden, ids, weights = layer(dtype)
    out = experts(hidden, ids, weights)
    out.sum().backward()
    assert out.dtype == dtype
    assert experts.w_down.grad is not None
    assert experts.w_down.grad.dtype == dtype
    assert sqnr(out, by_loop(experts, hidden, ids, weights)) >= 22


def test_autocast_with_fp32_parameters() -> None:
    experts, hidden, ids, weights = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(hidden, ids, weights)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert experts.w_gate_up.grad is not None
    assert experts.w_gate_up.grad.dtype == torch.float32


def test_state_dict_is_plain_and_loads_back() -> None:
    experts, hidden, ids, weights = layer()
    state = experts.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "w_gate_up": (4, 512, 128),
        "w_down": (4, 128, 256),
    }
    assert all(type(parameter) is torch.nn.Parameter for parameter in experts.parameters())
    other = SwiGLUExperts(4, 128, 256)
    other.load_state_dict(state)
    assert_same_bits(other(hidden, ids, weights), experts(hidden, ids, weights))


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_compiles_whole() -> None:
    experts, hidden, ids, weights = layer()
    torch.compiler.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (60, 50, 40, 30):  # the second size makes the first dimension dynamic
        arguments = (hidden[:tokens].detach(), ids[:tokens], weights[:tokens].detach())
        with torch.compiler.set_stance("fail_on_recompile" if tokens < 50 else "default"):
            assert_same_bits(compiled(*arguments), experts(*arguments))
    compiled(hidden, ids, weights).sum().backward()
    assert experts.w_down.grad is not None


def test_trains() -> None:
    experts, hidden, ids, weights = layer()
    target = torch.randn(60, 128)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(experts(hidden.detach(), ids, weights.detach()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 128, 128), "num_experts is 0"),
        ((2, 0, 128), "hidden_size is 0; it must be at least 1"),
        ((2, 128, 0), "intermediate_size is 0"),
    ],
)
def test_bad_sizes(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwiGLUExperts(*arguments)


def test_bad_inputs() -> None:
    experts, hidden, ids, weights = layer()
    with pytest.raises(ValueError, match=r"hidden has shape \(60, 64\); its last dimension must be H, 128"):
        experts(hidden[:, :64], ids, weights)
    with pytest.raises(TypeError, match=r"topk_ids has dtype torch\.float32; it must be an integer dtype"):
        experts(hidden, weights, weights)
    with pytest.raises(ValueError, match=r"topk_ids has shape \(59, 2\); it must be \(60, k\)"):
        experts(hidden, ids[1:], weights[1:])
    with pytest.raises(ValueError, match=r"topk_weights has shape \(60, 1\) and topk_ids \(60, 2\)"):
        experts(hidden, ids, weights[:, :1])


def test_inputs_are_named_as_the_caller_names_them() -> None:
    experts, hidden, ids, weights = layer()
    with pytest.raises(TypeError, match=r"hidden has dtype torch\.float64"):
        experts(hidden.double(), ids, weights)
    with pytest.raises(TypeError, match=r"topk_weights has dtype torch\.complex64"):
        experts(hidden, ids, weights.to(torch.complex64))
    with pytest.raises(TypeError, match=r"topk_ids is a list"):
        experts(hidden, ids.tolist(), weights)
    with pytest.raises(ValueError, match=r"topk_ids is on meta and hidden on cpu"):
        experts(hidden, ids.to("meta"), weights)
    with pytest.raises(TypeError, match=r"config is 'auto'; it must be an FP8Config"):
        SwiGLUExperts(2, 128, 128, config="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint16])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    experts = SwiGLUExperts(130, 128, 128)
    hidden, ids, weights = torch.randn(20, 128), torch.randint(0, 120, (20, 2)), torch.rand(20, 2)
    assert_same_bits(experts(hidden, ids.to(dtype), weights), experts(hidden, ids, weights))


def test_public_names() -> None:
    assert all(getattr(fp8moe, name) is not None for name in fp8moe.__all__)
