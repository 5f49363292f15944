"""Test set-up: Triton kernels run on the GPU where there is one, under the exact interpreter elsewhere."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is first imported

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

settings.register_profile(
    "ci", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests need a GPU, `multi_gpu` tests two. Tests that use the `device` fixture run anywhere, and count as
    `gpu` tests on one."""
    too_few = torch.cuda.device_count() < 2
    for item in items:
        if HAS_GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if too_few and item.get_closest_marker("multi_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs two CUDA GPUs"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _share_gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """One `large` test at a time, whatever the number of workers; each worker gives back what it has in excess."""
    if HAS_GPU and WORKERS > 1 and request.node.get_closest_marker("large"):
        import fcntl

        with (Path(tempfile.gettempdir()) / "fp8moe-large-test").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
            torch.cuda.empty_cache()
        return
    yield
    if HAS_GPU and torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def _inductor_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """On a CPU Inductor takes what another CPU compiled out of its cache, and then computes something else."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
