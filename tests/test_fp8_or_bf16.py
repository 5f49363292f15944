"""AUTO decides between FP8 and BF16 by the right size of each op, and the op does what was decided."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx import GraphModule

import fp8moe
from fp8moe import FP8Config, WeightCache
from fp8moe.gemm import select
from fp8moe.gemm.cost import Cost, CostModel, Costs, OpSize
from fp8moe.gemm.select import FP8_PAYS_UP_TO, fp8_pays
from fp8moe.gemm.tuning import decided_by
from tests.measures import assert_same_bits, sqnr

FREE, SLOW = Cost(0, 0, 0, 0), Cost(1, 0, 0, 0)
FROM_200_ROWS = Costs(
    bf16=Cost(0, 1, 0, 0), fp8=Cost(FP8_PAYS_UP_TO * 200 * 256 - 1, 0, 0, 0, host=10), fp8_cached=FREE
)
"""For products of 128 features. With cached weights FP8 is always faster."""
FROM_200_ROWS_BY_HOST = Costs(
    bf16=Cost(0, 1, 0, 0, host=5), fp8=Cost(0, 0.5, 0, 0, host=FP8_PAYS_UP_TO * 200 * 256 - 1), fp8_cached=FREE
)
"""The same, for the device would take FP8 from the first row on."""
NEVER, ALWAYS = Costs(FREE, SLOW, SLOW), Costs(SLOW, FREE, FREE)
H, I, E = 128, 256, 3  # noqa: E741


@pytest.fixture
def found_to_pay(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As on a GPU where sizes decide: for each op, whether FP8 was found to pay."""
    answers: list[bool] = []

    def recorded(costs: Costs, exact: OpSize, cached: bool, padded: OpSize, *, kept: bool) -> bool:
        answers.append(fp8_pays(costs, exact, cached, padded, kept=kept))
        return answers[-1]

    monkeypatch.setattr(select, "sizes_decide", lambda config, device: True)
    monkeypatch.setattr(select, "fp8_pays", recorded)
    monkeypatch.setattr(select, "_decide_once", select._decide_once.__wrapped__)  # it asks in every call
    return answers


def product(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.randn(rows, 128, dtype=torch.bfloat16)
    w = torch.randn(2, 128, 128, dtype=torch.bfloat16, requires_grad=True)
    return a, w, torch.tensor([rows // 2, rows], dtype=torch.int32)


def grouped(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return fp8moe.grouped_mm(a, w.transpose(-2, -1), offs)


@pytest.mark.parametrize("costs", [FROM_200_ROWS, FROM_200_ROWS_BY_HOST], ids=["device", "host"])
def test_a_product_goes_by_its_rows_and_its_cache(found_to_pay: list[bool], costs: Costs) -> None:
    model = CostModel("", "", product=costs, layer=NEVER)
    with decided_by(model):
        for rows in (0, 199, 200):
            a, w, offs = product(rows)
            grouped(a, w, offs)
        a, w, offs = product(10)
        b, main_grad = w.transpose(-2, -1), torch.zeros(2, 128, 128)
        fp8moe.grouped_mm(a, b, offs, weight_cache=WeightCache(w))
        fp8moe.grouped_mm(a, b, offs, main_grad=main_grad)
    assert found_to_pay == [False, False, True, True, False]


def test_a_decision_is_made_once_for_a_shape_and_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[OpSize] = []

    def pays(costs: Costs, exact: OpSize, cached: bool, padded: OpSize, *, kept: bool) -> bool:
        asked.append(exact)
        return fp8_pays(costs, exact, cached, padded, kept=kept)

    monkeypatch.setattr(select, "sizes_decide", lambda config, device: True)
    monkeypatch.setattr(select, "fp8_pays", pays)
    grad_fns = []
    for costs in (ALWAYS, NEVER, ALWAYS):  # three models, though two are equal
        with decided_by(CostModel("", "", product=costs, layer=NEVER)):
            for rows in (10, 10, 12, 10):
                out = grouped(*product(rows))
            assert out.grad_fn is not None
            grad_fns.append(out.grad_fn.name())
    assert len(asked) == 3 * 2
    assert grad_fns == ["_FP8GroupedMMBackward", "GroupedMmBackward0", "_FP8GroupedMMBackward"]


def layer(num_tokens: int = 20) -> tuple[Tensor, ...]:
    hidden = torch.randn(num_tokens, H, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(E, (num_tokens, 2))
    weights = torch.rand(num_tokens, 2)
    w_gate_up = torch.randn(E, 2 * I, H, dtype=torch.bfloat16, requires_grad=True)
    w_down = torch.randn(E, H, I, dtype=torch.bfloat16, requires_grad=True)
    return hidden, ids, weights, w_gate_up, w_down


def test_a_layer_is_decided_once_for_both_weights(found_to_pay: list[bool]) -> None:
    hidden, ids, weights, w_gate_up, w_down = layer()
    grads = torch.zeros_like(w_gate_up, dtype=torch.float32), torch.zeros_like(w_down, dtype=torch.float32)
    caches = WeightCache(w_gate_up), WeightCache(w_down)
    model = CostModel("", "", product=ALWAYS, layer=FROM_200_ROWS)
    with decided_by(model):
        for main_grads in (grads, (grads[0], None), (None, grads[1])):
            fp8moe.moe_forward(*layer(), main_grads=main_grads)
        for weight_caches in (caches, (caches[0], None), (None, caches[1])):
            fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down, weight_caches=weight_caches)
        rows = torch.randn(30, H, dtype=torch.bfloat16)
        offs = torch.tensor([10, 20, 30], dtype=torch.int32)
        fp8moe.swiglu_experts(rows, w_gate_up, w_down, offs, main_grads=grads, weight_caches=caches)
    assert found_to_pay == [False, False, False, True, False, False, True]


def test_the_rows_of_a_layer_are_its_choices(found_to_pay: list[bool]) -> None:
    features = (2 * I + H) + (I + H)
    costs = Costs(bf16=Cost(0, 1, 0, 0), fp8=Cost(FP8_PAYS_UP_TO * 40 * features - 1, 0, 0, 0), fp8_cached=FREE)
    with decided_by(CostModel("", "", product=NEVER, layer=costs)):
        fp8moe.moe_forward(*layer(19))
        fp8moe.moe_forward(*layer(20))
    assert found_to_pay == [False, True]


def test_a_layer_in_bf16_is_bf16_throughout(found_to_pay: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever AUTO would take for its products."""

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a weight is quantized")

    monkeypatch.setattr("fp8moe.quantize.reference.quantize_weight", never)
    hidden, ids, weights, w_gate_up, w_down = layer()
    with decided_by(CostModel("", "", product=ALWAYS, layer=NEVER)):
        fp8moe.moe_forward(hidden, ids, weights, w_gate_up, w_down).sum().backward()
        w_gate, w_up = (half.detach().contiguous() for half in w_gate_up.chunk(2, dim=1))
        fp8moe.moe_forward(hidden, ids, weights, (w_gate, w_up), w_down).sum().backward()
    assert found_to_pay == [False] * 2


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("costs", [FROM_200_ROWS, FROM_200_ROWS_BY_HOST], ids=["device", "host"])
def test_compiled_code_decides_by_rows_as_eager_code_does(
    monkeypatch: pytest.MonkeyPatch, dynamic: bool | None, costs: Costs
) -> None:
    monkeypatch.setattr(select, "sizes_decide", lambda config, device: True)
    a, w, _ = product(400)
    torch.compiler.reset()
    with decided_by(CostModel("", "", product=costs, layer=NEVER)):
        compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        stance = "default"
        for rows in (30, 40, 400, 50, 250, 199, 200):
            offs = torch.tensor([7, rows], dtype=torch.int32)
            with torch.compiler.set_stance(stance):
                actual = compiled(a[:rows], w, offs)
            assert_same_bits(actual, grouped(a[:rows], w, offs))
            assert (sqnr(actual, reference(a[:rows], w, offs)) < 40) == (rows >= 200)  # FP8 is noisier
            stance = "fail_on_recompile" if rows == 400 else stance  # one graph below 200 rows and one above
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
@pytest.mark.parametrize("rows", [3, 400])
def test_a_trace_is_guarded_by_few_comparisons_of_sizes_with_constants(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    def guards() -> Counter[str]:
        """What the graph of a product with symbols for sizes is guarded by."""
        found: Counter[str] = Counter()

        def backend(graph: GraphModule, inputs: Sequence[object]) -> GraphModule:
            mode = TracingContext.get().fake_mode
            assert mode is not None
            assert mode.shape_env is not None
            found.update(str(guard.expr) for guard in mode.shape_env.guards)
            return graph

        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(grouped, fullgraph=True, backend=backend, dynamic=True)(*product(rows))
        torch.compiler.reset()
        return found

    undecided = guards()
    monkeypatch.setattr(select, "sizes_decide", lambda config, device: True)
    costs = Costs(bf16=Cost(3e4, 1, 0, 0, host=1e5), fp8=Cost(4e4, 0.9, 0, 0, host=9.8e4), fp8_cached=FREE)
    with decided_by(CostModel("", "", product=costs, layer=NEVER)):
        added = guards() - undecided
    assert 1 <= added.total() <= 3


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
def test_rows_that_only_the_device_counts_are_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled code, as after an all-to-all."""

    def counted(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        kept = rows.repeat_interleave(counts, dim=0, output_size=int(counts.sum()))
        return grouped(kept * kept, w, counts.cumsum(0, dtype=torch.int32))

    monkeypatch.setattr(select, "sizes_decide", lambda config, device: True)
    rows, w, _ = product(2)
    always = CostModel("", "", product=ALWAYS, layer=NEVER)
    torch.compiler.reset()
    counts_in_the_graph = torch._dynamo.config.patch(capture_scalar_outputs=True)
    with counts_in_the_graph, decided_by(CostModel("", "", product=FROM_200_ROWS, layer=NEVER)):
        compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
        for counts in ([2, 300], [3, 1], [0, 0]):
            actual = compiled(rows, w, torch.tensor(counts))
            with decided_by(always):
                assert_same_bits(actual, counted(rows, w, torch.tensor(counts)))
    torch.compiler.reset()


def reference(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return torch.cat([a[: offs[0]].float() @ w[0].float().t(), a[offs[0] :].float() @ w[1].float().t()])


def test_what_is_kept_of_weights_counts(found_to_pay: list[bool]) -> None:
    costs = Costs(bf16=Cost(0, 0, 3.0, 0), fp8=Cost(0, 0, 3.2, 0), fp8_cached=Cost(0, 0, 2.0, 0))
    with decided_by(CostModel("", "", product=costs, layer=costs)):
        for kept in (False, True):
            a, w, offs = product(100)
            config = FP8Config(keep_quantized_weights=kept)
            fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, config=config)
    assert found_to_pay == [False, True]
