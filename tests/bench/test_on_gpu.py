"""The measurements that only a GPU has."""

import gc
from functools import partial

import pytest
import torch

from fp8moe.bench.graphs import captured
from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.measure import check_variant, in_use
from fp8moe.bench.memory import peak_bytes
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Balance, layer_shape, product_shape
from fp8moe.bench.timing import Budget, CudaStopwatch, host_microseconds, measure
from fp8moe.bench.tune.cli import device_to_tune
from fp8moe.bench.tune.grid import Case
from fp8moe.bench.tune.measure import measure_case
from fp8moe.bench.variants import fp8moe_variants
from fp8moe.config import FP8Config
from fp8moe.gemm.explain import explain

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
@pytest.mark.parametrize("name", ["", "gpt-oss"])
def test_each_of_pytorchs_ways_is_right_and_can_be_captured(name: str) -> None:
    for tokens in (512, 384):  # another shape is another compilation
        shape = layer_shape(tokens, 2, 256, 128, 4, name)
        problem = LAYER.problem(shape, Balance.SKEWED, gpu(), 0)
        expected = problem.products(LAYER.reference(shape))
        ways = LAYER.baselines(shape, gpu())
        assert len({variant.name for variant in ways}) == (3 if name else 6)
        for variant in ways:
            with in_use(variant, problem):
                checked = check_variant(variant, problem, expected)
                assert min(checked.sqnr_db.values()) > (25 if name else 40)
                captured(partial(problem.products, variant.op))()


def test_between_variants_no_memory_is_held() -> None:
    shape = product_shape(1024, 256, 256, 4)
    problem = PRODUCT.problem(shape, Balance.RAGGED, gpu(), 0)
    config = FP8Config(allow_bf16=False)
    for _ in range(2):  # kernels may keep what they made at their first call
        held = torch.cuda.memory_allocated()
        for variant in fp8moe_variants(PRODUCT.run(shape), PRODUCT.options(shape), partial(explain, gpu(), config)):
            with in_use(variant, problem) as (forward, backward):
                backward(forward())
        gc.collect()
    assert torch.cuda.memory_allocated() == held


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
