"""The layer in INT8 and INT4: against the dequantized weights, at the edges of routing, from modules, in a graph."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fp8moe
from fp8moe.int8 import Int8Experts, QuantizedExperts, int8_moe_forward, quantize_experts, quantize_module
from tests.generators import choices
from tests.gpu.support import no_synchronization


def weights(num_experts: int, hidden: int, intermediate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, device=device) / hidden**0.5
    return gate_up, torch.randn(num_experts, hidden, intermediate, device=device) / intermediate**0.5


def layer(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """In fp64, a choice at a time."""
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for expert in range(down.shape[0]):
        token, choice = torch.where(topk_ids == expert)
        gate, up = (hidden[token].double() @ gate_up[expert].double().t()).chunk(2, 1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[expert].double().t()
        out.index_add_(0, token, rows * topk_weights[token, choice, None].double())
    return out


def dequantized_layer(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: QuantizedExperts) -> Tensor:
    gate_up = experts.gate_up.dequantized().double()
    if experts.inv_smooth is not None:
        gate_up = gate_up * experts.inv_smooth[:, None].double()
    return layer(hidden, topk_ids, topk_weights, gate_up, experts.down.dequantized())


def layer_in_bf16(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: QuantizedExperts) -> Tensor:
    """Of the dequantized weights: all that a BF16 layer stores is rounded to BF16."""
    out = torch.zeros_like(hidden, dtype=torch.float32)
    gate_up, down = (weight.dequantized().bfloat16() for weight in (experts.gate_up, experts.down))
    for expert in range(down.shape[0]):
        token, choice = torch.where(topk_ids == expert)
        gate, up = (hidden[token] @ gate_up[expert].t()).float().chunk(2, 1)
        rows = (torch.nn.functional.silu(gate) * up).bfloat16() @ down[expert].t()
        out.index_add_(0, token, rows.float() * topk_weights[token, choice, None])
    return out.bfloat16().double()


def worst_error(out: Tensor, expected: Tensor) -> float:
    """The largest error of any element, relative to the root mean square of its row: no row can hide another's."""
    size = expected.double().square().mean(1, keepdim=True).sqrt()
    live = size[:, 0] > 0
    assert (out[~live] == 0).all()
    errors = ((out.double() - expected.double()).abs() / size)[live]
    return float(errors.max()) if len(errors) else 0.0


def routing(num_tokens: int, k: int, num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    topk_weights, topk_ids = torch.rand(num_tokens, num_experts, device=device).softmax(1).topk(k)
    return topk_ids, topk_weights


@given(drawn=choices(max_tokens=20), bits=st.sampled_from([8, 4]), smooth=st.booleans(), seed=st.integers(0, 100))
def test_any_routing(
    device: torch.device, drawn: tuple[list[list[int]], int, int], bits: int, smooth: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    ids, num_experts, k = drawn
    topk_ids = torch.tensor(ids, dtype=torch.int64, device=device).view(-1, k)
    hidden = torch.randn(len(topk_ids), 48, device=device)
    topk_weights = torch.rand(topk_ids.shape, device=device)
    scales = torch.rand(num_experts, 48, device=device) + 0.5 if smooth else None
    experts = quantize_experts(*weights(num_experts, 48, 32, device), bits, 32, scales)
    out = int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    assert out.shape == hidden.shape
    # What is left is the rounding of both activations, each to one of 255 values.
    assert worst_error(out, dequantized_layer(hidden, topk_ids, topk_weights, experts)) < 0.12


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [1, 512])
def test_close_to_bf16_on_the_same_weights(device: torch.device, bits: int, num_tokens: int) -> None:
    """(T=512, H=2048, I=1024, E=8, k=2, group 128), and T=1; on a CPU of a quarter of the sizes. Each element."""
    h, i = (2048, 1024) if device.type == "cuda" else (512, 256)
    torch.manual_seed(0)
    gate_up, down = (w.bfloat16() for w in weights(8, h, i, device))
    experts = quantize_experts(gate_up, down, bits, 128)
    hidden = torch.randn(num_tokens, h, device=device).bfloat16()
    topk_ids, topk_weights = routing(num_tokens, 2, 8, device)
    out = int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    assert out.dtype == torch.bfloat16
    exact = dequantized_layer(hidden, topk_ids, topk_weights, experts)
    for expected in (exact, layer_in_bf16(hidden, topk_ids, topk_weights, experts)):
        assert (out.double() - expected).norm() / expected.norm() < 0.015
        assert ((out.double() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.02
        assert worst_error(out, expected) < 0.1
    original = layer(hidden, topk_ids, topk_weights, gate_up, down)
    against_original = float((out.double() - original).norm() / original.norm())
    assert against_original < (0.02 if bits == 8 else 0.25)
    assert bits == 8 or against_original > 0.05  # INT4 weights are what differs


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_few_tokens_of_wide_experts(bits: int, num_tokens: int) -> None:
    """Whose second product is long enough to multiply rows in slices."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    gate_up, down = (w.bfloat16() for w in weights(4, 512, 4096, device))
    experts = quantize_experts(gate_up, down, bits, 128)
    hidden = torch.randn(num_tokens, 512, device=device).bfloat16()
    topk_ids, topk_weights = routing(num_tokens, 2, 4, device)
    out = int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    expected = dequantized_layer(hidden, topk_ids, topk_weights, experts)
    assert (out.double() - expected).norm() / expected.norm() < 0.02
    assert worst_error(out, expected) < 0.1


def test_tiles_of_activations(device: torch.device) -> None:
    """What share a scale: by default as many features as go with the group; a scale a row is less accurate."""
    torch.manual_seed(0)
    gate_up, down = weights(2, 256, 256, device)
    made = {
        size: quantize_experts(gate_up, down, 8, size).activation_tiles for size in (32, 96, 128, 192, 320, 512, None)
    }
    assert made == {
        32: (32, 32), 96: (96, 32), 128: (128, 32), 192: (64, 32), 320: (64, 32), 512: (128, 32), None: (128, 32)
    }  # fmt: skip
    hidden = torch.randn(30, 256, device=device)
    topk_ids, topk_weights = routing(30, 2, 2, device)
    errors = []
    for tiles in ((64, 32), (128, 64), (None, 128), (None, None)):
        experts = quantize_experts(gate_up, down, 8, 128, activation_tiles=tiles)
        expected = dequantized_layer(hidden, topk_ids, topk_weights, experts)
        errors.append(float((int8_moe_forward(hidden, topk_ids, topk_weights, experts) - expected).norm()))
    assert errors == sorted(errors)
    with pytest.raises(ValueError, match="activation_tiles is 96 and group_size 128"):
        quantize_experts(gate_up, down, 8, 128, activation_tiles=(96, 64))


def test_edges_of_routing(device: torch.device) -> None:
    torch.manual_seed(0)
    experts = quantize_experts(*weights(5, 32, 16, device), 8, 32)
    hidden = torch.randn(40, 32, device=device)
    ones = torch.ones(40, 2, device=device)
    on_one = torch.full((40, 2), 3, device=device)
    expected = dequantized_layer(hidden, on_one, ones, experts)
    assert worst_error(int8_moe_forward(hidden, on_one, ones, experts), expected) < 0.1
    dropped = on_one.clone()
    dropped[:, 1], dropped[7] = 5, -1
    out = int8_moe_forward(hidden, dropped, ones, experts)
    assert (out[7] == 0).all()
    assert worst_error(out, dequantized_layer(hidden, dropped, ones, experts)) < 0.1
    assert int8_moe_forward(hidden[:0], on_one[:0], ones[:0], experts).shape == (0, 32)
    all_dropped = int8_moe_forward(hidden, torch.full_like(on_one, -1), ones, experts)
    assert (all_dropped == 0).all()


def test_nan_stays_in_its_token(device: torch.device) -> None:
    torch.manual_seed(0)
    experts = quantize_experts(*weights(3, 32, 16, device), 4, 32)
    hidden = torch.randn(9, 32, device=device)
    topk_ids, topk_weights = routing(9, 2, 3, device)
    clean = int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    hidden[4, 5] = torch.nan
    out = int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    assert out[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(out[others], clean[others])


def test_smoothing_helps_where_features_are_outliers(device: torch.device) -> None:
    torch.manual_seed(0)
    gate_up, down = weights(2, 64, 32, device)
    hidden = torch.randn(30, 64, device=device)
    hidden[:, 3] *= 100
    topk_ids, topk_weights = routing(30, 1, 2, device)
    expected = layer(hidden, topk_ids, topk_weights, gate_up, down)
    smooth = hidden.abs().amax(0).sqrt().expand(2, -1)
    errors = [
        (
            int8_moe_forward(hidden, topk_ids, topk_weights, quantize_experts(gate_up, down, 8, 64, scales)) - expected
        ).norm()
        for scales in (None, smooth)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_from_a_trained_module(device: torch.device, bits: int) -> None:
    torch.manual_seed(0)
    module = fp8moe.SwiGLUExperts(4, 64, 32, device=device)
    experts = quantize_module(module, bits, 32)
    by_hand = quantize_experts(module.w_gate_up, module.w_down, bits, 32)
    assert torch.equal(experts.gate_up.data, by_hand.gate_up.data)
    assert experts.nbytes < 4 * sum(parameter.numel() for parameter in module.parameters()) / (3 if bits == 8 else 5)
    served = Int8Experts(experts)
    assert not list(served.parameters())
    hidden = torch.randn(20, 64, device=device)
    topk_ids, topk_weights = routing(20, 2, 4, device)
    out = served(hidden, topk_ids, topk_weights)
    assert torch.equal(out, int8_moe_forward(hidden, topk_ids, topk_weights, experts))
    expected = module(hidden, topk_ids, topk_weights)
    assert (out - expected).norm() / expected.norm() < (0.08 if bits == 8 else 0.25)  # the module computes in FP8
    other = Int8Experts(quantize_module(fp8moe.SwiGLUExperts(4, 64, 32, device=device), bits, 32))
    other.load_state_dict(served.state_dict())
    assert torch.equal(other(hidden, topk_ids, topk_weights), out)


class HandWrittenExperts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.w3 = torch.nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.w2 = torch.nn.Parameter(torch.randn(4, 32, 64) / 6)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        act = torch.nn.functional.silu(torch.einsum("th,ehi->tei", x, self.w1)) * torch.einsum(
            "th,ehi->tei", x, self.w3
        )
        outs = torch.einsum("tei,eih->teh", act, self.w2)
        chosen = outs.gather(1, ids[:, :, None].expand(-1, -1, outs.shape[2]))
        return (chosen * gates[:, :, None]).sum(1)


def test_from_hand_written_experts() -> None:
    torch.manual_seed(0)
    module = HandWrittenExperts()
    hidden = torch.randn(10, 64)
    topk_ids, topk_weights = routing(10, 2, 4, torch.device("cpu"))
    out = int8_moe_forward(hidden, topk_ids, topk_weights, quantize_module(module, 8, 32))
    expected = module(hidden, topk_ids, topk_weights)
    assert (out - expected).norm() / expected.norm() < 0.02


def test_compiles_whole(device: torch.device) -> None:
    torch.manual_seed(0)
    experts = quantize_experts(*weights(4, 32, 16, device), 4, 32)
    hidden = torch.randn(12, 32, device=device)
    topk_ids, topk_weights = routing(12, 2, 4, device)
    compiled = torch.compile(Int8Experts(experts), fullgraph=True, backend="aot_eager")
    out = compiled(hidden, topk_ids, topk_weights)
    assert torch.equal(out, int8_moe_forward(hidden, topk_ids, topk_weights, experts))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [1, 64, 1000])
def test_replays_in_a_graph_with_other_routing(bits: int, num_tokens: int) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    experts = quantize_experts(*weights(16, 512, 256, device), bits, 128)
    hidden = torch.randn(num_tokens, 512, device=device).bfloat16()
    topk_ids, topk_weights = routing(num_tokens, 4, 16, device)
    int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    graph = torch.cuda.CUDAGraph()
    with no_synchronization(), torch.cuda.graph(graph):
        out = int8_moe_forward(hidden, topk_ids, topk_weights, experts)
    for _ in range(3):
        new_ids, new_weights = routing(num_tokens, 4, 16, device)
        topk_ids.copy_(new_ids)
        topk_weights.copy_(new_weights)
        hidden.normal_()
        graph.replay()
        assert torch.equal(out, int8_moe_forward(hidden, topk_ids, topk_weights, experts))
        assert worst_error(out, dequantized_layer(hidden, topk_ids, topk_weights, experts)) < 0.15


EXPERTS = quantize_experts(torch.ones(2, 8, 16), torch.ones(2, 16, 4))
HIDDEN, IDS, WEIGHTS = torch.ones(3, 16), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((HIDDEN, IDS, WEIGHTS, "experts"), TypeError, "experts is a str"),
        ((HIDDEN[:, :8], IDS, WEIGHTS, EXPERTS), ValueError, r"it must be \(T, 16\)"),
        ((HIDDEN.int(), IDS, WEIGHTS, EXPERTS), TypeError, "hidden has dtype"),
        ((HIDDEN, IDS[:2], WEIGHTS, EXPERTS), ValueError, "topk_ids has shape"),
        ((HIDDEN, IDS.float(), WEIGHTS, EXPERTS), TypeError, "topk_ids has dtype"),
        ((HIDDEN, IDS, WEIGHTS[:2], EXPERTS), ValueError, "topk_weights has shape"),
        ((HIDDEN.clone().requires_grad_(), IDS, WEIGHTS, EXPERTS), ValueError, "hidden requires a gradient"),
    ],
)
def test_wrong_arguments(given: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        int8_moe_forward(*given)  # type: ignore[arg-type]


def test_what_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match="they must be"):
        quantize_experts(torch.ones(2, 8, 16), torch.ones(2, 16, 5))
    with pytest.raises(ValueError, match="must be even for 4 bits"):
        quantize_experts(torch.ones(2, 6, 16), torch.ones(2, 16, 3), 4)
    with pytest.raises(ValueError, match="whose weights fp8moe does not know"):
        quantize_module(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="module is a str"):
        quantize_module("experts")  # type: ignore[arg-type]
