"""The measurements that only a GPU has."""

from functools import partial

import pytest
import torch

from fp8moe.bench.graphs import captured
from fp8moe.bench.layer import baseline
from fp8moe.bench.layer.baseline import bf16_layer
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import check_variant
from fp8moe.bench.memory import peak_bytes
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Balance, layer_shape, product_shape
from fp8moe.bench.timing import Budget, CudaStopwatch, host_microseconds, measure
from fp8moe.bench.tune.cli import device_to_tune
from fp8moe.bench.tune.grid import Case
from fp8moe.bench.tune.measure import measure_case

pytestmark = pytest.mark.gpu
BUDGET = Budget(20)


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_events_see_the_device_work_and_not_the_flush() -> None:
    stopwatch = CudaStopwatch(gpu())
    x = torch.randn(2**28, device="cuda")
    long = measure(lambda: x.sum(), stopwatch, BUDGET).median_ms
    short = measure(lambda: x[: 2**16].sum(), stopwatch, BUDGET).median_ms
    assert long > 1e3 * x.nbytes / 20e12  # no memory reads 20 TB/s
    assert short < long / 3


def test_a_replay_computes_again() -> None:
    x = torch.randn(1000, device="cuda")
    y = torch.empty_like(x)
    replay = captured(lambda: torch.mul(x, 2, out=y))
    x.fill_(21.0)
    replay()
    assert (y == 42).all()


def test_a_region_that_waits_is_refused_and_leaves_the_device_usable() -> None:
    x = torch.randn(1000, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        captured(lambda: x.sum().item())
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.randn(1000, device="cuda").std() > 0.5


def test_peak_counts_what_is_freed_again() -> None:
    held = torch.empty(2**20, device="cuda")
    peak = peak_bytes(lambda: torch.empty(2**24, device="cuda").mul_(1), gpu())
    assert peak is not None
    assert held.nbytes < 2**26 <= peak < 2**27


@pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of what they do themselves
def test_the_compiled_baseline_is_the_plain_one_and_can_be_captured() -> None:
    for tokens in (512, 384):  # another shape is another compilation
        shape = layer_shape(tokens, 2, 256, 128, 4)
        problem = LAYER.problem(shape, Balance.SKEWED, gpu(), 0)
        expected = problem.products(baseline._variant(lambda function: function, "").op)
        variant = bf16_layer(gpu())
        checked = check_variant(variant, problem, expected)
        assert checked.computed_by == "torch grouped_mm, compiled SwiGLU and sums"
        assert min(checked.sqnr_db.values()) > 40
        out = problem.forward(variant.op)
        for _ in range(2):
            problem.backward(out, keep_graph=True)
        del out  # a capture finds the gradient accumulators of a graph that is alive on another stream
        captured(partial(problem.products, variant.op))()


@pytest.mark.parametrize(
    "case",
    [Case(PRODUCT, product_shape(2048, 256, 512, 4)), Case(LAYER, layer_shape(512, 2, 256, 128, 4))],
    ids=["product", "layer"],
)
def test_each_way_that_auto_chooses_from_can_be_captured(case: Case) -> None:
    try:
        device = device_to_tune()
    except ValueError as error:
        pytest.skip(str(error))
    sample = measure_case(case, device, CudaStopwatch(device), BUDGET, partial(host_microseconds, device=device))
    assert sample.host_us is not None
    for microseconds in (sample.bf16_us, sample.fp8_us, sample.fp8_cached_us, *sample.host_us):
        assert 5 < microseconds < 1e5
