"""Gates are recognized by what they compute."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.integrations.transformers_support import build_experts, qwen_experts

gates = pytest.importorskip("fp8moe.integrations.transformers.gates", exc_type=ImportError)
GateForm = gates.GateForm
SIZES = {"hidden_size": 128, "num_experts": 4}


def with_gate(apply_gate: Any, **attributes: Any) -> Any:
    """Experts of a class of its own with this gate."""
    experts = qwen_experts()
    experts.__class__ = type("OwnExperts", (type(experts),), {"_apply_gate": apply_gate})
    vars(experts).update(attributes)
    return experts


def clamped(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


@pytest.mark.parametrize(
    ("activation", "form"),
    [
        ("silu", GateForm("silu")),
        ("gelu", GateForm("gelu")),
        ("gelu_pytorch_tanh", GateForm("gelu_tanh")),
        ("gelu_new", GateForm("gelu_tanh")),  # another class, the same function
        ("relu2", GateForm("relu2")),
    ],
)
def test_activations(activation: str, form: Any) -> None:
    assert gates.gate_of(qwen_experts(hidden_act=activation)) == form


def test_gates_of_models() -> None:
    gpt_oss = build_experts("gpt_oss", "GptOss", hidden_size=128, intermediate_size=128, num_local_experts=4)
    assert gates.gate_of(gpt_oss) == GateForm("silu", alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True)
    minimax = build_experts("minimax_m3_vl", "MiniMaxM3VL", hidden_size=128, intermediate_size=128, num_local_experts=4)
    assert gates.gate_of(minimax) == GateForm("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    nemotron = build_experts("nemotron_h", "NemotronH", hidden_size=128, moe_intermediate_size=128, n_routed_experts=4)
    assert gates.gate_of(nemotron) == GateForm("relu2", has_gate=False)


def test_a_class_of_ones_own() -> None:
    assert gates.gate_of(with_gate(clamped, limit=3.0)) == GateForm("silu", limit=3.0)
    assert gates.gate_of(with_gate(clamped, limit=5.0)) == GateForm("silu", limit=5.0)


def test_a_number_that_has_changed() -> None:
    experts = with_gate(clamped, limit=3.0)
    gates.gate_of(experts)
    experts.limit = 4.0
    assert gates.gate_of(experts) == GateForm("silu", limit=4.0)


def almost_swiglu(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up.clamp(max=1000.0)


def up_first(self: Any, gate_up: Tensor) -> Tensor:
    up, gate = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def with_a_number_that_nobody_reads(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(self.temperature * gate) * up


@pytest.mark.parametrize("apply_gate", [almost_swiglu, up_first, with_a_number_that_nobody_reads])
def test_unknown_gates(apply_gate: Any) -> None:
    found = gates.gate_of(with_gate(apply_gate, temperature=1.0))
    assert found == "its gate is that of OwnExperts._apply_gate, which fp8moe does not know"


def test_unknown_activations() -> None:
    assert gates.gate_of(qwen_experts(hidden_act="relu")) == "its gate is ReLU(gate) * up, which fp8moe does not know"
    experts = qwen_experts()
    experts.act_fn = nn.GELU()  # one of two functions, and its class does not say which
    assert "GELU(gate) * up, which fp8moe does not know" in gates.gate_of(experts)


def test_within_a_tracer() -> None:
    with FakeTensorMode():
        assert gates.gate_of(with_gate(clamped, limit=2.0)) == GateForm("silu", limit=2.0)


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_compiled_code_is_that_of_the_number() -> None:
    """One compilation for all layers with the same gate, another one for another limit."""
    compiled: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def limit_of(experts: Any, x: Tensor) -> Tensor:
        gate = gates.gate_of(experts)
        return x if gate.limit is None else x + gate.limit

    kind = type(first := with_gate(clamped, limit=3.0))
    second, third = with_gate(clamped, limit=3.0), with_gate(clamped, limit=4.0)
    second.__class__ = third.__class__ = kind
    assert [float(limit_of(experts, torch.zeros(()))) for experts in (first, second, third)] == [3, 3, 4]
    assert len(compiled) == 2


@pytest.mark.parametrize(
    "form",
    [
        GateForm("silu"),
        GateForm("gelu"),
        GateForm("gelu_tanh", limit=2.0),
        GateForm("silu", alpha=1.702, limit=1.0, up_offset=1.0, interleaved=True),
    ],
    ids=str,
)
def test_a_form_is_a_function_of_gate_and_up(form: Any) -> None:
    gate, up = torch.randn(2, 50, 16, dtype=torch.float64) * 3
    expected_gate, expected_up = gate, up
    if form.limit is not None:
        expected_gate, expected_up = gate.minimum(torch.tensor(form.limit)), up.clamp(-form.limit, form.limit)
    if form.activation == "silu":
        activated = expected_gate / (1 + torch.exp(-form.alpha * expected_gate))
    else:
        activated = F.gelu(expected_gate, approximate="tanh" if form.activation == "gelu_tanh" else "none")
    projected = torch.stack([gate, up], -1).flatten(-2) if form.interleaved else torch.cat([gate, up], -1)
    torch.testing.assert_close(form(projected), activated * (expected_up + form.up_offset))
