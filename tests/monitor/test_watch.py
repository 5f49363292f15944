"""What a monitor reports of models that train."""

import copy
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8moe
from fp8moe import ActivationStorage, FP8Config, Gate, ScaleFormat, SwiGLUExperts
from fp8moe.gate import GatedActivation
from fp8moe.monitor import JsonLines, Monitor, MonitorWarning, Reading, TensorBoard, Thresholds, statistics, watch
from fp8moe.monitor.call import NUM_BLOCKS, Call
from fp8moe.monitor.transfer import Shipment
from fp8moe.monitor.watch import Writer
from fp8moe.quantize import sample_sums, swiglu_reference
from fp8moe.rows.routing import Routing
from tests.distributed.cases import counting_reads
from tests.measures import assert_same_bits

H, I, E, T, K = 128, 128, 4, 96, 2  # noqa: E741


class Layers(nn.Module):
    """Two layers whose routing is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SwiGLUExperts(E, H, I, **options) for _ in range(2))
        self.checkpointing: bool | None = None
        """None: not at all; else whether in the reentrant way."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = torch.full(ids.shape, 0.5)
        for layer in self.layers:
            if self.checkpointing is None:
                x = x + layer(x, ids, weights)
            else:
                x = x + checkpoint(layer, x, ids, weights, use_reentrant=self.checkpointing)
        return x


def some_ids(experts: int = E) -> Tensor:
    return torch.stack([torch.randperm(experts)[:K] for _ in range(T)])


def train(model: nn.Module, steps: int = 1, ids: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The last output."""
    for _ in range(steps):
        out: Tensor = model(torch.randn(T, H, requires_grad=True), some_ids() if ids is None else ids)
        out.backward(torch.randn_like(out) * scale)
    return out


def reading_of(monitor: Monitor) -> Reading:
    reading = monitor.read()
    assert reading is not None
    return reading


@pytest.fixture
def model() -> Layers:
    return Layers()


QUANTIZED = ("hidden", "activation", "d_output", "d_gate_up")
ROWS_AND_TOKENS = {f"{name}.{kind}" for name in QUANTIZED for kind in ("rows", "tokens")}


def test_every_operand_of_every_layer_is_measured_every_so_many_steps(model: Layers) -> None:
    with watch(model, every=3) as monitor:
        steps = []
        for _ in range(7):
            train(model)
            latest = monitor.latest()
            steps.append(None if latest is None else latest.step)
        assert steps == [None, 1, 1, 1, 4, 4, 4]
        reading = reading_of(monitor)
    assert reading.step == 7
    assert [*reading.layers] == [*monitor.layers] == ["layers.0", "layers.1"]
    for layer in reading.layers.values():
        assert {*layer.operands} == ROWS_AND_TOKENS | {"w_gate_up", "w_down"}
        assert all(x.sqnr_db is not None and 30 < x.sqnr_db < 34 for x in layer.operands.values())
        assert sum(layer.tokens_per_expert) == T * K
    assert reading.alerts == ()
    assert reading.unseen == ()


@pytest.mark.parametrize("storage", ActivationStorage)
@pytest.mark.parametrize("gate", [Gate.swiglu(), Gate.relu_squared(), Gate.clamped_swiglu(7.0)])
def test_operands_are_measured_as_the_reference_makes_them(storage: ActivationStorage, gate: Gate) -> None:
    """With few rows, the sample has all of them."""
    i, up = 96, gate.projections * 96
    x, dout = torch.randn(100, H, requires_grad=True), torch.randn(100, H)
    ids = torch.randint(-1, E, (100, K))
    weights = torch.rand(100, K)
    w_gate_up, w_down, bias = torch.randn(E, up, H) / 8, torch.randn(E, H, i) / 8, torch.randn(E, up)
    for w in (w_gate_up, w_down):
        w.requires_grad_()
    config = FP8Config(scale_format=ScaleFormat.POW2, activation_storage=storage)
    monitor = watch(every=1, warn=False)
    seen: dict[str, Tensor] = {}
    with monitor.layer("it"), pytest.MonkeyPatch.context() as patched:

        def record(make: Any) -> Any:
            def recorded(sample: Tensor) -> Tensor:
                seen[f"{len(seen)} {make.__name__}"] = sample.flatten(0, 1)
                return cast(Tensor, make(sample))

            return recorded

        for name in ("row_tiles", "token_tiles", "block_tiles"):
            patched.setattr(sample_sums, name, record(getattr(sample_sums, name)))
        options: dict[str, Any] = {"config": config, "gate": gate, "biases": (bias, None)}
        fp8moe.moe_forward(x, ids, weights, w_gate_up, w_down, **options).backward(dout)
    hidden, _, w1, w2, act, act_tokens, d_out, _, d_rows, d_tokens = seen.values()
    reading = reading_of(monitor)
    tiles_of_hidden = sample_sums.row_tiles(hidden[None])
    of_hidden = statistics.from_sums(sample_sums.sums_of(tiles_of_hidden, ScaleFormat.POW2).tolist())
    assert reading.layers["it"].operands["hidden.rows"].sqnr_db == pytest.approx(of_hidden[2])

    groups = (routing := Routing.from_topk(ids, E, weights)).groups
    live = int(groups.padded_ends[-1])
    assert live == NUM_BLOCKS * 128
    source, token = groups.row_source[:live].long(), routing.row_token[:live].long()
    is_row = source >= 0
    assert torch.equal(hidden[is_row], x[token[is_row]])
    assert torch.equal(d_out[is_row], dout[token[is_row]])
    for sample in (hidden, act, act_tokens, d_out, d_tokens):
        assert not sample[~is_row].any()
    assert not d_rows.view(live, -1)[~is_row].any()
    assert w1.shape == (NUM_BLOCKS * 128, H)
    known = {tuple(row) for row in w_gate_up.flatten(0, 1).tolist()} | {(0.0,) * H}
    assert {tuple(row) for row in w1.tolist()} <= known
    assert len({tuple(row) for row in w1.tolist()}) > 128
    assert torch.equal(w2, w_down.flatten(0, 1))  # a band of each expert
    # In high precision, so as near as FP8 comes.
    expert = groups.row_expert[:live][is_row].long()
    rows = token[is_row]
    product = torch.einsum("mh,mnh->mn", x[rows], w_gate_up[expert]) + bias[expert]
    product = product.detach().requires_grad_()
    assert routing.row_weights is not None
    expected = swiglu_reference.swiglu(product, routing.row_weights[source[is_row]], GatedActivation(i, gate))
    d_act = torch.einsum("mh,mhi->mi", dout[rows], w_down[expert])
    expected.backward(d_act.detach())
    for actual, wanted in (
        (act[is_row], expected.detach()),
        (act_tokens[is_row], expected.detach()),
        (d_tokens.view(live, -1, 128)[is_row][:, :, :i].flatten(1), product.grad),
        (d_rows.view(live, -1, 128)[is_row][:, :, :i].flatten(1), product.grad),
    ):
        assert wanted is not None
        assert (actual - wanted).norm() < 0.15 * wanted.norm()


@pytest.mark.parametrize("bias", [False, True])
def test_the_graph_of_a_sampled_step_keeps_no_maps_of_all_rows(bias: bool) -> None:
    """While it is alive, and its own tensors apart: those of a sample have 512 rows at most."""
    count, weights = 4096, (torch.randn(E, 2 * I, H).requires_grad_(), torch.randn(E, H, I).requires_grad_())
    calls: list[Call] = []
    made = Call.__init__

    def remember(self: Call, *args: Any) -> None:
        made(self, *args)
        calls.append(self)

    with pytest.MonkeyPatch.context() as patched, watch(every=1, warn=False) as monitor, monitor.layer("it"):
        patched.setattr(Call, "__init__", remember)
        x, ids = torch.randn(count, H, requires_grad=True), torch.randint(0, E, (count, 1))
        biases = (torch.randn(E, 2 * I), None) if bias else (None, None)
        out = fp8moe.moe_forward(x, ids, torch.ones(count, 1), *weights, biases=biases)
        out.sum().backward()
        sizes = [tensor.numel() for tensor in tensors_within(calls[0])]
    assert len(calls) == 1
    assert len(sizes) > 3
    assert max(sizes) <= 512


def tensors_within(thing: Any) -> list[Tensor]:
    """All that it refers to, through containers and objects of fp8moe."""
    if isinstance(thing, Tensor):
        return [thing]
    parts: list[Any] = []
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    elif type(thing).__module__.startswith("fp8moe."):
        parts = [getattr(thing, name) for name in vars(thing) if name != "_log"]
    return [tensor for part in parts for tensor in tensors_within(part)]


def test_tokens_are_counted_over_the_microbatches_of_a_step(model: Layers) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, every=2, optimizer=optimizer) as monitor:
        chosen = [some_ids() for _ in range(3)]
        for ids in chosen:
            train(model, ids=ids)
        optimizer.step()
        latest = monitor.latest()
        assert latest is not None
        assert latest.step == 1
        expected = tuple(torch.bincount(torch.cat(chosen).flatten(), minlength=E).tolist())
        assert [layer.tokens_per_expert for layer in latest.layers.values()] == [expected] * 2
        train(model)
        optimizer.step()
        assert monitor.latest() is latest


def test_a_dead_expert_is_named_after_some_readings(model: Layers) -> None:
    monitor = watch(model, every=1, thresholds=Thresholds(dead_after=3))
    train(model, 2, some_ids(3))
    assert reading_of(monitor).layers["layers.0"].dead_experts == ()
    train(model, 1, some_ids(3))
    with pytest.warns(MonitorWarning) as given:
        reading = reading_of(monitor)
    assert [str(x.message) for x in given] == [
        f"layers.{n}: no tokens for expert 3 in the last 3 readings, at step 3" for n in (0, 1)
    ]
    assert reading.layers["layers.1"].dead_experts == (3,)
    assert reading.layers["layers.1"].max_load > 4 / 3
    train(model, 2)
    assert reading_of(monitor).layers["layers.1"].dead_experts == ()
    monitor.close()


@pytest.mark.parametrize("where", ["hidden", "hidden, an odd column", "weight", "gradient"])
def test_nan_is_reported_with_the_layer_and_the_step_where_it_began(model: Layers, where: str) -> None:
    expected = {"weight": "layers.1: output", "gradient": "layers.1: d_hidden"}.get(where, "layers.0: hidden")
    monitor = watch(model, every=100)
    train(model, 4)
    x, dout = torch.randn(T, H), torch.randn(T, H)
    if where.startswith("hidden"):
        x[3, 5 if "odd" in where else 0] = float("nan")
    elif where == "weight":
        with torch.no_grad():
            cast(SwiGLUExperts, model.layers[1]).w_down[2, 5, 7] = float("nan")
    else:
        dout[0, 0] = float("inf")
    model(x.requires_grad_(), some_ids()).backward(dout)
    train(model, 5)
    with pytest.warns(MonitorWarning, match=f"{expected} is NaN or infinite from step 5 on"):
        train(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 12)
        first = reading_of(monitor).not_finite
    monitor.close()
    assert first is not None
    assert str(first).startswith(expected)


def test_gradients_too_small_for_fp8_are_reported(model: Layers) -> None:
    monitor = watch(model, every=1)
    train(model, scale=1e-37)
    with pytest.warns(MonitorWarning) as given:
        reading = reading_of(monitor)
    monitor.close()
    assert "layers.1: underflow of d_output.rows is 1, above 0.05, at step 1" in {str(x.message) for x in given}
    assert {str(x.message) for x in given} == {alert.message for alert in reading.alerts}
    assert reading.layers["layers.1"].operands["d_output.rows"].underflow == 1
    assert reading.layers["layers.1"].operands["d_output.rows"].sqnr_db == 0
    assert reading.layers["layers.1"].operands["hidden.rows"].underflow < 0.01


def test_a_jump_of_amax_is_reported_and_a_slow_change_is_not(model: Layers) -> None:
    monitor = watch(model, every=1)
    for step in range(8):
        train(model, scale=1.3**step)
    assert reading_of(monitor).alerts == ()
    train(model, scale=1.3**8 * 40)
    with pytest.warns(MonitorWarning) as given:
        drift = reading_of(monitor).layers["layers.1"].operands["d_output.rows"].amax_drift
    assert len({str(x.message) for x in given}) == 8  # the rows and tokens of d_output and d_gate_up, of two layers
    assert all("amax_drift of d_" in str(x.message) and "powers of two away" in str(x.message) for x in given)
    assert math.log2(40) < drift < math.log2(40) + 3
    monitor.close()


def test_values_that_are_all_alike_are_reported_as_saturated(model: Layers) -> None:
    monitor = watch(model, every=1, warn=False)
    out = model(torch.randn(T, H), some_ids())
    out.backward(torch.ones_like(out))
    reading = reading_of(monitor)
    assert reading.layers["layers.1"].operands["d_output.rows"].saturation == 1
    assert any("saturation of d_output.rows is 1, above 0.25" in alert.message for alert in reading.alerts)
    monitor.close()


def test_a_warning_is_given_once_until_it_is_over(model: Layers) -> None:
    monitor = watch(model, every=1, thresholds=Thresholds(amax_drift=None, sqnr_db=None, saturation=None))
    for scale, count in ((1e-36, True), (1e-36, False), (1.0, False), (1e-36, True)):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            train(model, scale=scale)
            monitor.read()
        assert bool(given) == count
    monitor.close()


def test_nothing_waits_for_the_device_and_results_are_the_same_bits() -> None:
    found = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = Layers()
        monitor = watch(model, every=1) if watched else None
        with patch.object(Shipment, "is_here", False), counting_reads() as reads:  # as long as the device works
            out = train(model, 3)
            count = reads()
        found.append((out, [weight.grad for weight in model.parameters()], count))
        if monitor is not None:
            assert monitor.latest() is not None
            monitor.close()
    (out, grads, count), (watched_out, watched_grads, watched_count) = found
    assert_same_bits(watched_out, out)
    for actual, expected in zip(watched_grads, grads, strict=True):
        assert actual is not None
        assert expected is not None
        assert_same_bits(actual, expected)
    assert watched_count == count


def test_a_step_that_is_not_sampled_is_one_launch_a_layer_and_direction(model: Layers) -> None:
    noted: list[str] = []
    with watch(model, every=100) as monitor, pytest.MonkeyPatch.context() as patched:
        train(model)
        before = monitor.read()
        patched.setattr(
            "fp8moe.monitor.checks.note_not_finite", lambda x, _, y, *__: noted.append("x" if y is None else "xy")
        )
        patched.setattr("fp8moe.monitor.call.add_sample_sums", None)
        train(model, 2)
        assert noted == ["xy", "xy", "x", "x"] * 2
        assert monitor.read() == before


def test_of_one_step_the_first_that_was_not_finite_is_named(model: Layers) -> None:
    """What came in is named, and not what came of it, in that layer and the next."""
    monitor = watch(model, every=100, warn=False)
    train(model)
    x = torch.randn(T, H)
    x[5] = float("inf")
    model(x, some_ids()).sum().backward()
    x[:] = float("nan")
    model(x, some_ids()).sum().backward()
    assert str(reading_of(monitor).not_finite) == "layers.0: hidden is NaN or infinite from step 2 on"
    monitor.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(model: Layers, reentrant: bool) -> None:
    model.checkpointing = reentrant
    ids = some_ids()
    with watch(model, every=2) as monitor:
        train(model, 3, ids)
        reading = reading_of(monitor)
    assert reading.step == 3
    for layer in reading.layers.values():
        assert layer.tokens_per_expert == tuple(torch.bincount(ids.flatten(), minlength=E).tolist())
        assert {*layer.operands} > ROWS_AND_TOKENS


def test_evaluation_is_not_seen(model: Layers) -> None:
    with watch(model, every=1) as monitor:
        train(model)
        model.eval()
        model(torch.randn(T, H), some_ids())
        model.train()
        with torch.no_grad():
            model(torch.randn(T, H), some_ids())
        reading = reading_of(monitor)
        assert reading.step == 1
        assert sum(reading.layers["layers.0"].tokens_per_expert) == T * K


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_stays_one_graph_and_is_said_not_to_be_seen(model: Layers) -> None:
    torch._dynamo.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = some_ids()
    x = torch.randn(T, H)
    expected = model(x, ids)
    monitor = watch(model, every=5, optimizer=optimizer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x, ids)
    assert_same_bits(out, expected)
    out.sum().backward()
    with pytest.warns(MonitorWarning, match="no layer was seen at step 1: they ran in compiled code"):
        optimizer.step()
    reading = reading_of(monitor)
    assert reading.unseen == ("layers.0", "layers.1")
    monitor.close()


def test_layers_without_rows_and_without_gradients(model: Layers) -> None:
    with watch(model, every=1) as monitor:
        train(model, ids=torch.full((T, K), -1))
        assert reading_of(monitor).layers["layers.0"].tokens_per_expert == (0,) * E
        assert reading_of(monitor).layers["layers.0"].max_load == 0
        model(torch.randn(0, H), torch.zeros(0, K, dtype=torch.long)).sum().backward()
        assert reading_of(monitor).layers["layers.0"].tokens_per_expert == (0,) * E
        for weight in model.parameters():
            weight.requires_grad_(False)
        model(torch.randn(T, H), some_ids())
        assert {*reading_of(monitor).layers["layers.0"].operands} == {
            "hidden.rows", "activation.rows", "w_gate_up", "w_down",
        }  # fmt: skip


def test_products_are_seen_by_number_and_functions_by_the_name_they_are_given() -> None:
    monitor = watch(every=2, warn=False)
    a, b = torch.randn(70, 128, requires_grad=True), torch.randn(3, 128, 64, requires_grad=True)
    offs = torch.tensor([10, 10, 60], dtype=torch.int32)
    for _ in range(2):
        with monitor.layer("mine"):
            first = fp8moe.grouped_mm(a, b, offs)
            fp8moe.grouped_mm(first, b.transpose(1, 2), offs).sum().backward()
        fp8moe.grouped_mm(a, b, offs).sum().backward()
        monitor.step()
    reading = reading_of(monitor)
    assert reading.step == 1
    assert reading.layers["mine"].tokens_per_expert == (10, 0, 50)
    names = {"a.rows", "a.tokens", "b", "d_out.rows", "d_out.tokens"}
    assert {*reading.layers["mine"].operands} == {f"product{n}.{name}" for n in (0, 1) for name in names}
    for operand in ("product0.a.rows", "product1.d_out.tokens", "product1.b"):
        assert f"mine/{operand}/sqnr_db" in reading.as_dict()


def test_where_the_layer_runs_in_bf16_rows_are_counted_and_results_checked(model: Layers) -> None:
    with pytest.MonkeyPatch.context() as patched, watch(model, every=1) as monitor:
        patched.setattr("fp8moe.autograd.experts.backends_for", lambda *_, **__: None)
        train(model)
        layer = reading_of(monitor).layers["layers.1"]
        assert sum(layer.tokens_per_expert) == T * K
        assert not layer.operands
        out = model(torch.randn(T, H), some_ids())
        out.backward(torch.full_like(out, float("nan")))
        with pytest.warns(MonitorWarning, match=r"layers\.1: d_output is NaN or infinite from step 2"):
            monitor.read()


def test_readings_go_to_files_and_loggers(model: Layers, tmp_path: Path) -> None:
    scalars: dict[str, float] = {}
    histograms: list[str] = []
    board = SimpleNamespace(
        add_scalar=lambda name, value, step: scalars.update({name: value}),
        add_histogram=lambda name, values, step: histograms.append(name),
        add_text=lambda *_: None,
        flush=lambda: None,
    )
    path, dicts = tmp_path / "logs" / "monitor.jsonl", list[dict[str, float]]()
    writers: list[Writer] = [JsonLines(path), TensorBoard(board), lambda reading: dicts.append(reading.as_dict())]
    with watch(model, every=2, steps_taken=10, writers=writers) as monitor:
        train(model, 3)
        reading = reading_of(monitor)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [11, 13]
    assert lines[-1] == json.loads(json.dumps(reading.as_json()))
    of_down = lines[-1]["layers"]["layers.0"]["operands"]["w_down"]
    assert of_down["sqnr_db"] == scalars["layers.0/w_down/sqnr_db"] == dicts[-1]["layers.0/w_down/sqnr_db"]
    assert all(math.isfinite(value) for value in dicts[-1].values())
    assert histograms == ["layers.0/experts/rows", "layers.1/experts/rows"] * 2
    assert "layers.1" in str(reading)
    assert "d_gate_up.tokens" in str(reading)
    assert "busiest expert" in reading.summary()


def test_tensorboard_files(model: Layers, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with watch(model, every=1, writers=[TensorBoard(tmp_path)]):
        train(model)
    assert [*tmp_path.glob("events*")]


def test_a_monitor_that_is_closed_sees_nothing(model: Layers) -> None:
    monitor = watch(model, every=1)
    with pytest.raises(ValueError, match=r"layers\.0 is watched already: close\(\)"):
        watch(model)
    train(model)
    monitor.close()
    train(model, 3)
    reading = monitor.latest()
    assert reading is not None
    assert reading.step == 1
    watch(model).close()


def test_a_copy_of_a_model_is_not_watched(model: Layers) -> None:
    with watch(model, every=1) as monitor:
        copied = copy.deepcopy(model)
        train(model)
        train(copied, 3)
        reading = reading_of(monitor)
        assert reading.step == 1
        assert sum(reading.layers["layers.0"].tokens_per_expert) == T * K
    with watch(copied):
        train(copied)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, ValueError, "Linear has no experts to watch"),
        ({"model": 3}, TypeError, "model is a int"),
        ({"every": 0}, ValueError, "every is 0; it must be at least 1"),
        ({"every": 1.5}, TypeError, "every is 1.5; it must be an int"),
        ({"steps_taken": -1}, ValueError, "steps_taken is -1"),
        ({"optimizer": 3}, TypeError, "optimizer is a int"),
        ({"thresholds": 0.1}, TypeError, "thresholds is 0.1; it must be a Thresholds"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        watch(**arguments)


def test_steps_that_are_counted_are_not_counted_twice(model: Layers) -> None:
    with watch(model) as monitor, pytest.raises(RuntimeError, match="count_forwards=False"):
        monitor.step()
    with pytest.raises(TypeError, match=r"Thresholds\.underflow is 'much'"):
        Thresholds(underflow="much")  # type: ignore[arg-type]
