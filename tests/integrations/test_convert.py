"""`fp8moe.convert` in models that somebody else wrote."""

import copy
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8moe
from fp8moe import FP8Config
from tests.measures import assert_same_bits, sqnr

E, H, I = 4, 256, 128  # noqa: E741 - the field's name


def gather(hidden: Tensor, ids: Tensor, weights: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Each token through its experts."""
    out = torch.zeros_like(hidden)
    for number in range(E):
        token, choice = torch.where(ids == number)
        out = out.index_add(0, token, expert(number, hidden[token]) * weights[token, choice, None])
    return out


class Three(nn.Module):
    """Mixtral's names."""

    def __init__(self, intermediate_size: int = I) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, intermediate_size, H) / 16)
        self.w2 = nn.Parameter(torch.randn(E, H, intermediate_size) / 11)
        self.w3 = nn.Parameter(torch.randn(E, intermediate_size, H) / 16)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        def expert(number: int, rows: Tensor) -> Tensor:
            return self.activate(rows @ self.w1[number].T, rows @ self.w3[number].T) @ self.w2[number].T

        return gather(x, topk_ids, topk_weights, expert)


class Fused(nn.Module):
    """Gate and up in one parameter, either first, each parameter in either orientation."""

    def __init__(self, up_first: bool, transposed: tuple[bool, bool]) -> None:
        super().__init__()
        shapes = ((2 * I, H), (H, I))
        self.first, self.second = (
            nn.Parameter(torch.randn(E, *(shape[::-1] if turn else shape)) / 14)
            for shape, turn in zip(shapes, transposed, strict=True)
        )
        self.up_first, self.transposed = up_first, transposed

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        first, second = (
            weight.mT if turn else weight
            for weight, turn in zip((self.first, self.second), self.transposed, strict=True)
        )

        def expert(number: int, rows: Tensor) -> Tensor:
            one, other = (rows @ first[number].T).chunk(2, -1)
            return (F.silu(other) * one if self.up_first else F.silu(one) * other) @ second[number].T

        return gather(x, topk_ids, topk_weights, expert)


class WeightsFirst(Three):
    """The arguments in another order."""

    def forward(self, x: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, indices, scores)


class Grouped(Three):
    """Rows that are grouped by expert already."""

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:  # type: ignore[override]
        parts = torch.split(x, num_tokens_per_expert.tolist())
        return torch.cat(
            [
                self.activate(rows @ gate.T, rows @ up.T) @ down.T
                for rows, gate, up, down in zip(parts, self.w1, self.w3, self.w2, strict=True)
            ]
        )


def routed(tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, H, requires_grad=True)
    weights, ids = torch.rand(tokens, E).topk(2)
    return hidden, ids, weights.requires_grad_()


def results(module: nn.Module, *inputs: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters."""
    out = (module if call is None else call)(*inputs)
    wanted = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, torch.sin(torch.arange(out.numel())).view_as(out))]


def assert_computes_the_same_in_fp8(converted: nn.Module, own: nn.Module, *inputs: Tensor) -> None:
    for actual, expected in zip(results(converted, *inputs), results(own, *inputs), strict=True):
        assert 22 <= sqnr(actual, expected) <= 60


class Model(nn.Module):
    """Two layers of experts."""

    def __init__(self, kind: Callable[[], nn.Module] = Three) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            weights, ids = self.router(x).softmax(-1).topk(2)
            x = x + layer(x, ids, weights)
        return x


class TestWhatItFinds:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_three_weights(self, dtype: torch.dtype) -> None:
        own = Three().to(dtype)
        converted = copy.deepcopy(own)
        assert fp8moe.convert(converted).converted == 1
        hidden, ids, weights = routed()
        inputs = hidden.detach().to(dtype).requires_grad_(), ids, weights.detach().to(dtype).requires_grad_()
        out = fp8moe.moe_forward(*inputs, (own.w1, own.w3), own.w2)
        assert_same_bits(converted(*inputs), out)
        assert sqnr(out, own(*inputs)) >= 22

    @pytest.mark.parametrize(("up_first", "first", "second"), list(product((False, True), repeat=3)))
    def test_fused_weights(self, up_first: bool, first: bool, second: bool) -> None:
        own = Fused(up_first, (first, second))
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        assert_computes_the_same_in_fp8(converted, own, *routed())

    def test_a_square_layer(self) -> None:
        """Shapes do not tell gate, up and down apart, nor how they are stored."""
        own = Three(H)
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        assert_computes_the_same_in_fp8(converted, own, *routed())

    def test_arguments_in_another_order(self) -> None:
        own = WeightsFirst()
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        hidden, ids, weights = routed()
        assert_computes_the_same_in_fp8(converted, own, hidden, weights, ids)
        assert_same_bits(converted(hidden, indices=ids, scores=weights), converted(hidden, weights, ids))

    def test_rows_that_are_grouped(self) -> None:
        own = Grouped()
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        assert_computes_the_same_in_fp8(converted, own, routed()[0], torch.tensor([7, 0, 30, 3]))

    def test_experts_that_compute_in_bf16(self) -> None:
        class InBF16(Three):
            def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return super().forward(x, topk_ids, topk_weights)

        own = InBF16()
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        assert_computes_the_same_in_fp8(converted, own, *routed())

    def test_own_modules(self) -> None:
        report = fp8moe.convert(fp8moe.SwiGLUExperts(E, H, I), strict=True)
        assert [entry.runs for entry in report.experts] == ["fp8moe in FP8"]


class WithBias(Three):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(E, H))  # of no effect yet


class Clamped(Three):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=10)) * up


class GELU(Three):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate) * up


class ClampedFarOut(Three):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.clamp(-100, 100)


class Detached(Three):
    """The right output, and no gradient of the router."""

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return super().forward(x, topk_ids, topk_weights.detach())


class Dropping(Three):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.dropout(F.silu(gate) * up, 0.1, self.training)


class Failing(Three):
    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        raise NotImplementedError("only on Sundays")


class OtherArguments(Three):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


class OtherShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(E, 3, 5)), nn.Parameter(torch.ones(E, 7, 9))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a bias": (WithBias, "other parameters or buffers, which fp8moe would leave out: bias"),
    "a clamp": (Clamped, "does not compute down"),
    "a clamp of the largest": (ClampedFarOut, "does not compute down"),
    "GELU": (GELU, "does not compute down"),
    "dropout": (Dropping, "does not compute down"),
    "dropout in evaluation": (lambda: Dropping().eval(), "does not compute down"),
    "no gradient of the router": (Detached, "or not with the usual gradients"),
    "an error": (Failing, "its forward fails on a trial: NotImplementedError: only on Sundays"),
    "arguments": (OtherArguments, "its forward(x: torch.Tensor) -> torch.Tensor takes none of (hidden, topk_ids"),
    "shapes": (
        OtherShapes,
        "not those of a gate, an up- and a down-projection: a (4, 3, 5), b (4, 7, 9)",
    ),
    "a dtype": (lambda: Three().double(), "its weights are torch.float64"),
    "no memory": (lambda: Three().to("meta"), "its weights are on meta"),
}


class TestWhatItLeaves:
    @pytest.mark.parametrize("case", REFUSED)
    def test_says_why(self, case: str) -> None:
        kind, words = REFUSED[case]
        model = nn.Sequential(nn.Linear(2, 2), kind())
        before = type(model[1])
        report = fp8moe.convert(model)
        (entry,) = report.experts
        assert (entry.name, entry.runs, report.converted) == ("1", "as before", 0)
        assert entry.why.startswith("found ")
        assert words in entry.why
        assert str(report).endswith("\nnothing was converted")
        assert type(model[1]) is before
        with pytest.raises(ValueError, match="not all can be converted"):
            fp8moe.convert(model, strict=True)

    def test_nothing(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        report = fp8moe.convert(model)
        assert str(report).startswith("no experts found: no module has parameters of experts")
        assert "nothing was converted" in str(report)
        with pytest.raises(ValueError, match="strict"):
            fp8moe.convert(model, strict=True)

    def test_strict_changes_nothing_if_it_raises(self) -> None:
        model = nn.Sequential(Three(), Clamped())
        with pytest.raises(ValueError, match="does not compute down"):
            fp8moe.convert(model, strict=True)
        assert type(model[0]) is Three

    def test_a_filter(self) -> None:
        model = Model()
        report = fp8moe.convert(model, filter_fn=lambda module, name: name == "layers.1", strict=True)
        assert [(entry.name, entry.runs) for entry in report.experts] == [
            ("layers.0", "as before"),
            ("layers.1", "fp8moe in FP8"),
        ]
        assert "filter_fn" in str(report)
        assert type(model.layers[0]) is Three

    def test_random_numbers_are_drawn_as_before(self) -> None:
        model = nn.Sequential(Three(), Clamped())
        state = torch.get_rng_state()
        fp8moe.convert(model)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("training", [False, True])
    def test_the_mode_is_as_before(self, training: bool) -> None:
        model = Model().train(training)
        fp8moe.convert(model)
        assert {module.training for module in model.modules()} == {training}

    def test_where_sizes_decide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on Hopper, where a report that knows no sizes names the function that does."""
        module = sys.modules["fp8moe.integrations.convert"]
        monkeypatch.setattr(module, "what_runs", lambda explanation, sizes_are_known: ("fp8moe", ""))
        report = fp8moe.convert(Three())
        assert report.converted == 1
        assert "ask fp8moe.explain(layer=(T, k, H, I, E))" in str(report)

    def test_bad_arguments(self) -> None:
        with pytest.raises(TypeError, match=r"model is a str; it must be a torch.nn.Module"):
            fp8moe.convert("model")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="FP8Config"):
            fp8moe.convert(Three(), config="fast")  # type: ignore[arg-type]


class TestAConvertedModel:
    def test_keeps_its_parameters_and_its_class(self) -> None:
        model = Model()
        parameters, state = dict(model.named_parameters()), list(model.state_dict())
        fp8moe.convert(model, strict=True)
        assert dict(model.named_parameters()) == parameters
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert list(model.state_dict()) == state
        assert isinstance(model.layers[0], Three)

    def test_trains_and_is_copied(self) -> None:
        torch.manual_seed(0)
        own = Model()
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        x, target = torch.randn(2, 64, H)
        histories = []
        for model in (own, converted, copy.deepcopy(converted)):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            history = []
            for _ in range(8):
                loss = F.mse_loss(model(x), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                history.append(float(loss.detach()))
            histories.append(history)
        assert histories[1] == histories[2] != histories[0]
        assert histories[1] == pytest.approx(histories[0], rel=0.02)
        assert histories[1][-1] < 0.8 * histories[1][0]

    def test_undo(self) -> None:
        own, x = Model(), torch.randn(10, H)
        before = own(x)
        report = fp8moe.convert(own)
        assert (own(x) != before).any()
        assert fp8moe.convert(own).converted == 2  # already
        report.undo()
        assert_same_bits(own(x), before)
        assert type(own.layers[0]) is Three
        assert not hasattr(own.layers[0], "_fp8moe")
        report.undo()  # nothing is left to do

    def test_undo_after_another_change_of_the_class(self) -> None:
        module = Three()
        report = fp8moe.convert(module)
        module.__class__ = type("Sharded", (type(module),), {})
        with pytest.raises(RuntimeError, match="the class is now Sharded: undo what changed it first"):
            report.undo()

    def test_options(self) -> None:
        config = FP8Config(scale_format=fp8moe.ScaleFormat.POW2)
        module, inputs = Three(), routed()
        fp8moe.convert(module, config=config)
        expected = fp8moe.moe_forward(*inputs, (module.w1, module.w3), module.w2, config=config)
        assert_same_bits(module(*inputs), expected)

    def test_input_of_another_shape(self) -> None:
        class Flat(Three):
            def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
                flat = super().forward(x.flatten(0, -2), topk_ids.flatten(0, -2), topk_weights.flatten(0, -2))
                return flat.view_as(x)

        own = Flat()
        converted = copy.deepcopy(own)
        fp8moe.convert(converted, strict=True)
        inputs = [tensor.detach().view(2, 20, -1) for tensor in routed()]
        with pytest.warns(UserWarning, match=r"FP8Flat computes input of shape \(2, 20, 256\) itself"):
            out = converted(*inputs)
        assert_same_bits(out, own(*inputs))

    @pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
    def test_compiled(self) -> None:
        module, inputs = Three(), routed()
        fp8moe.convert(module)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        for actual, expected in zip(results(module, *inputs, call=compiled), results(module, *inputs), strict=True):
            assert sqnr(actual, expected) >= 40

    @pytest.mark.filterwarnings("ignore")  # of PyTorch, about one rank
    @pytest.mark.usefixtures("one_rank")
    def test_fsdp(self) -> None:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        plain, sharded = Model(), Model()
        sharded.load_state_dict(plain.state_dict())
        for model in (plain, sharded):
            fp8moe.convert(model, strict=True)
        for layer in sharded.layers:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        x = torch.randn(20, H)
        assert_same_bits(sharded(x), plain(x))


@pytest.mark.filterwarnings("ignore")  # of torchtitan, about what else is not installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchtitan_experts_are_like_hand_written_ones(dtype: torch.dtype) -> None:
    moe = pytest.importorskip("torchtitan.models.common.moe")
    own = moe.GroupedExperts(moe.GroupedExperts.Config(dim=H, hidden_dim=I, num_experts=E)).to(dtype)
    for weight in own.parameters():
        nn.init.normal_(weight, std=0.1)
    converted = copy.deepcopy(own)
    fp8moe.convert(converted, strict=True)
    rows, counts = torch.randn(40, H).to(dtype), torch.tensor([7, 0, 30, 3])
    assert 22 <= sqnr(converted(rows, counts), own(rows, counts)) <= 60


class TestTransformers:
    def build(self) -> Any:
        support = pytest.importorskip("tests.integrations.transformers_support")
        return support.build("Qwen3Moe", "eager")

    def test_is_set_experts_implementation(self) -> None:
        model, tokens = self.build(), torch.arange(32)[None]
        before = model(tokens).logits
        report = fp8moe.convert(model, strict=True)
        assert [entry.kind for entry in report.experts] == ["Qwen3MoeExperts"] * 2
        after = model(tokens).logits
        model.set_experts_implementation("eager")
        assert_same_bits(model(tokens).logits, before)
        model.set_experts_implementation("fp8moe")
        assert_same_bits(model(tokens).logits, after)
        report.undo()
        assert_same_bits(model(tokens).logits, before)
        assert 10 < sqnr(after, before) < 60

    def test_some_layers_with_options(self) -> None:
        model, tokens = self.build(), torch.arange(32)[None]
        before = model(tokens).logits
        config = FP8Config(scale_format=fp8moe.ScaleFormat.POW2)
        report = fp8moe.convert(model, config, filter_fn=lambda module, name: "layers.1" in name)
        assert [entry.runs for entry in report.experts] == ["as before", "fp8moe in FP8"]
        hf = sys.modules["fp8moe.integrations.transformers"]
        assert [entry.runs for entry in hf.report(model).experts] == ["eager", "fp8moe in FP8"]
        assert (model(tokens).logits != before).any()
        report.undo()
        assert_same_bits(model(tokens).logits, before)

    def test_says_why_not(self) -> None:
        support = pytest.importorskip("tests.integrations.transformers_support")
        report = fp8moe.convert(support.qwen_experts("eager", hidden_act="relu"))
        assert "its gate is ReLU" in str(report)
        assert report.converted == 0
