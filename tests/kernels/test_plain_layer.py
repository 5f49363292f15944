"""A routed layer in BF16 goes straight to products and kernels where it can, and computes what the operators do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fp8moe
from fp8moe.gate import SWIGLU, Gate
from fp8moe.gemm import plain_layer
from tests.kernels.support import GATES
from tests.measures import assert_same_bits, sqnr

E, H, K = 5, 48, 3
INTERMEDIATE = 40
NAMES = ("hidden", "topk_weights", "w_gate_up", "w_down")


@pytest.fixture(autouse=True)
def _bf16_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if AUTO had taken BF16, and Triton ran here."""
    monkeypatch.setattr("fp8moe.autograd.experts.backends_for", lambda *args, **kwargs: None)
    monkeypatch.setattr("fp8moe.autograd.experts_in_bf16.runs_triton", lambda device: True)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that went the plain way."""
    names: list[str] = []

    def watched(name: str) -> None:
        function = getattr(plain_layer, name)

        def call(*args: Any) -> Any:
            names.append(name.removeprefix("layer_"))
            return function(*args)

        monkeypatch.setattr(plain_layer, name, call)

    watched("layer_forward")
    watched("layer_backward")
    return names


def problem(device: torch.device, num_tokens: int, stored: str = "E,N,K", gate: Gate = SWIGLU) -> dict[str, Tensor]:
    def weight(n: int, k: int) -> Tensor:
        values = torch.randn(E, n, k).bfloat16().to(device) * k**-0.5
        return values if stored == "E,N,K" else values.transpose(1, 2).contiguous().transpose(1, 2)

    return {
        "hidden": torch.randn(num_tokens, H).bfloat16().to(device).requires_grad_(),
        "topk_weights": (torch.rand(num_tokens, K) + 0.1).to(device).requires_grad_(),
        "w_gate_up": weight(gate.projections * INTERMEDIATE, H).requires_grad_(),
        "w_down": weight(H, INTERMEDIATE).requires_grad_(),
        "topk_ids": torch.randint(-1, E - 1, (num_tokens, K)).to(device),  # nobody chooses the last
    }


def layer(x: dict[str, Tensor], **how: Any) -> Tensor:
    return fp8moe.moe_forward(x["hidden"], x["topk_ids"], x["topk_weights"], x["w_gate_up"], x["w_down"], **how)


def step(x: dict[str, Tensor], dout: Tensor, **how: Any) -> dict[str, Tensor]:
    """The output, and the gradients of what needs one."""
    out = layer(x, **how)
    wanted = [name for name in NAMES if x[name].requires_grad]
    return {"out": out, **dict(zip(wanted, torch.autograd.grad(out, [x[name] for name in wanted], dout), strict=True))}


def by_operators(x: dict[str, Tensor], dout: Tensor, **how: Any) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp8moe.autograd.experts_in_bf16.runs_triton", lambda device: False)
        return step(x, dout, **how)


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], least: float = 45.0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert (value.dtype, value.stride()) == (expected[name].dtype, expected[name].stride())
        if expected[name].any():
            assert sqnr(value, expected[name]) >= least, name
        else:
            assert not value.any(), name


@pytest.mark.parametrize("num_tokens", [1, 42, 43, 127, 128, 129])
@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
def test_computes_what_the_operators_do(device: torch.device, taken: list[str], num_tokens: int, stored: str) -> None:
    x = problem(device, num_tokens, stored)
    dout = torch.randn(num_tokens, H).bfloat16().to(device)
    dropped = num_tokens // 2
    x["topk_ids"][dropped] = -1
    with torch.no_grad():
        x["hidden"][dropped] = torch.nan
    actual = step(x, dout)
    assert taken == ["forward", "backward"]
    assert_near(actual, by_operators(x, dout))
    assert taken == ["forward", "backward"]
    assert not actual["out"][dropped].any()
    assert not actual["hidden"][dropped].any()
    assert not actual["topk_weights"][x["topk_ids"] < 0].any()
    for name in ("w_gate_up", "w_down"):
        assert not actual[name][E - 1].any()
        assert actual[name].stride() == x[name].stride()


@pytest.mark.parametrize("gate", GATES, ids=[gate.code for gate in GATES])
@pytest.mark.parametrize("interleaved", [False, True])
def test_takes_any_gate(device: torch.device, taken: list[str], gate: Gate, interleaved: bool) -> None:
    if interleaved and not gate.has_gate:
        pytest.skip("there is one projection")
    x, dout = problem(device, 50, gate=gate), torch.randn(50, H).bfloat16().to(device)
    assert_near(
        step(x, dout, gate=gate, interleaved=interleaved), by_operators(x, dout, gate=gate, interleaved=interleaved)
    )
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("expert", [-1, 0, E - 1])
def test_all_choose_one_expert_or_none(device: torch.device, taken: list[str], expert: int) -> None:
    x, dout = problem(device, 50), torch.randn(50, H).bfloat16().to(device)
    x["topk_ids"].fill_(expert)
    assert_near(step(x, dout), by_operators(x, dout))
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_router_weights_of_any_dtype(device: torch.device, dtype: torch.dtype) -> None:
    x, dout = problem(device, 50), torch.randn(50, H).bfloat16().to(device)
    x["topk_weights"] = x["topk_weights"].detach().to(dtype).requires_grad_()
    assert_near(step(x, dout), by_operators(x, dout))


@pytest.mark.parametrize("gradient", ["expanded", "transposed", "unaligned"])
def test_takes_gradients_of_any_strides(device: torch.device, taken: list[str], gradient: str) -> None:
    x, base = problem(device, 50), torch.randn(60, 60).bfloat16().to(device)
    dout = {
        "expanded": base[:1, :1].expand(50, H),
        "transposed": base.t()[:50, :H],
        "unaligned": base.flatten()[1 : 1 + 50 * H].view(50, H),
    }[gradient]
    for name, value in step(x, dout).items():
        assert_same_bits(value, step(x, dout.clone(memory_format=torch.contiguous_format))[name])
    assert taken[:2] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        (("hidden",), 4), (("topk_weights",), 3), (("w_gate_up",), 4), (("w_down",), 3),
        (("hidden", "w_down"), 5), (NAMES, 6),
    ],
)  # fmt: skip
def test_makes_no_product_for_frozen_inputs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...], products: int
) -> None:
    x, dout = problem(device, 50), torch.randn(50, H).bfloat16().to(device)
    for name in NAMES:
        x[name].requires_grad_(name in wanted)
    expected = by_operators(x, dout)
    grouped_mm, made = torch.nn.functional.grouped_mm, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.grouped_mm", counted)
    assert_near(step(x, dout), expected)
    assert len(made) == products


@pytest.mark.parametrize(
    "case", ["no tokens", "fp16", "fp32 weight", "odd H", "odd I", "strided hidden", "strided w", "unaligned w"]
)
def test_goes_another_way_where_pytorchs_product_refuses(device: torch.device, taken: list[str], case: str) -> None:
    x = {name: value.detach() for name, value in problem(device, 50).items()}
    if case == "no tokens":
        x |= {name: x[name][:0] for name in ("hidden", "topk_weights", "topk_ids")}
    elif case == "fp16":
        x["hidden"] = x["hidden"].half()
    elif case == "fp32 weight":
        x["w_down"] = x["w_down"].float()
    elif case == "odd H":
        x["hidden"], x["w_gate_up"] = x["hidden"][:, :-1].contiguous(), x["w_gate_up"][:, :, :-1].contiguous()
        x["w_down"] = x["w_down"][:, :-1].contiguous()
    elif case == "odd I":
        x["w_gate_up"], x["w_down"] = x["w_gate_up"][:, :-2].contiguous(), x["w_down"][:, :, :-1].contiguous()
    elif case == "strided hidden":
        x["hidden"] = x["hidden"].t().contiguous().t()
    elif case == "strided w":
        x["w_down"] = x["w_down"].repeat_interleave(2, dim=2)[:, :, ::2]
    elif case == "unaligned w":
        flat = torch.zeros(x["w_gate_up"].numel() + 1, dtype=torch.bfloat16, device=device)
        flat[1:] = x["w_gate_up"].flatten()
        x["w_gate_up"] = flat[1:].view(x["w_gate_up"].shape)
    for name in NAMES:
        x[name].requires_grad_()
    dout = torch.randn(x["hidden"].shape, device=device).to(x["hidden"].dtype)
    for name, value in step(x, dout).items():
        assert_same_bits(value, by_operators(x, dout)[name])
    assert taken == []


class Operators(TorchDispatchMode):
    """Records which are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")  # PyTorch's profiler warns of what it does itself
def test_who_watches_sees_operators(device: torch.device, taken: list[str]) -> None:
    x, dout = problem(device, 50), torch.randn(50, H).bfloat16().to(device)
    expected = step(x, dout)
    taken.clear()
    with Operators() as seen:
        step(x, dout)
    assert torch.ops.fp8moe.spread.default in seen.called
    with torch.profiler.profile():
        step(x, dout)
    assert taken == []
    out = layer(x)
    with torch.profiler.profile() as profile:  # in backward alone
        gradients = torch.autograd.grad(out, [x[name] for name in NAMES], dout)
    assert taken == ["forward"]
    assert "fp8moe::gated_in_bf16_backward" in {event.key for event in profile.key_averages()}
    assert_near(dict(zip(NAMES, gradients, strict=True)), {name: expected[name] for name in NAMES})


def test_saved_tensors_may_be_moved(device: torch.device, taken: list[str]) -> None:
    x, dout = problem(device, 50, stored="E,K,N"), torch.randn(50, H).bfloat16().to(device)
    expected = step(x, dout)

    def elsewhere(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=device).copy_(value)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, elsewhere):
        moved = step(x, dout)
    assert_near(moved, expected)
    assert taken == ["forward", "backward"] * 2


def test_differentiates_once(device: torch.device) -> None:
    x, dout = problem(device, 50), torch.randn(50, H).bfloat16().to(device)
    for name in NAMES:
        (gradient,) = torch.autograd.grad(layer(x), x[name], dout, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            gradient.square().sum().backward()


def test_adds_to_main_grads(device: torch.device, taken: list[str]) -> None:
    x, dout = problem(device, 50), torch.randn(50, H).bfloat16().to(device)
    expected = step(x, dout)
    main_grads = tuple(torch.ones_like(x[name], dtype=torch.float32) for name in ("w_gate_up", "w_down"))
    layer(x, main_grads=main_grads).backward(dout)
    assert taken == ["forward", "backward", "forward"]
    for main_grad, name in zip(main_grads, ("w_gate_up", "w_down"), strict=True):
        assert x[name].grad is None
        assert sqnr(main_grad - 1, expected[name].float()) >= 45
