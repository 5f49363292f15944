"""Which backend is selected, and what a user is told of the others."""

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fp8moe
from fp8moe import BackendUnavailableError, FP8Config, KernelPreference
from fp8moe.gemm import deepgemm_probe, select, tuning
from fp8moe.gemm import triton as triton_gemm
from fp8moe.gemm.base import Gemm, Missing
from fp8moe.gemm.cost import Cost, CostModel, Costs, OpSize, OpSizes
from fp8moe.gemm.deepgemm import DeepGemm
from fp8moe.gemm.select import backends_for, fp8_pays

HOPPER = (9, 0)
M_GROUPED = "def m_grouped_fp8_gemm_nt_contiguous(*args): ...\n"
K_GROUPED = "def k_grouped_fp8_gemm_nt_contiguous(*args): ...\n"
DRAINED = "tma_desc_wait_group<0>();"


def install_fake_deepgemm(root: Path, monkeypatch: pytest.MonkeyPatch, source: str, kernel: str | None) -> None:
    """Put a package `deep_gemm` with this source on the path, and this text as its K-grouped kernel."""
    package = root / "deep_gemm"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    if kernel is not None:
        impls = package / "include" / "deep_gemm" / "impls"
        impls.mkdir(parents=True)
        (impls / "sm90_fp8_gemm_1d1d.cuh").write_text(kernel)
    monkeypatch.syspath_prepend(root)
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # so that what is imported now is forgotten with the test
    del sys.modules["deep_gemm"]


def reasons(gemm: Gemm, capability: tuple[int, int] | None = HOPPER) -> str:
    return " ".join(str(missing) for missing in deepgemm_probe.missing_in_deepgemm(gemm, capability))


@pytest.mark.parametrize("gemm", Gemm)
def test_whole_deepgemm_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gemm: Gemm) -> None:
    install_fake_deepgemm(tmp_path, monkeypatch, M_GROUPED + K_GROUPED, DRAINED)
    assert deepgemm_probe.missing_in_deepgemm(gemm, HOPPER) == ()


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="deep_gemm is installed here")
def test_missing_module_is_told_with_the_command_to_install_it() -> None:
    assert "deep_gemm is not installed. Fix: pip install sgl-deep-gemm" in reasons(Gemm.FORWARD)


def test_import_broken_by_another_build_is_told_from_a_missing_dependency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undefined = "raise ImportError('_C.so: undefined symbol: _ZN3c105Error')"
    install_fake_deepgemm(tmp_path, monkeypatch, undefined, DRAINED)
    told = reasons(Gemm.FORWARD)
    assert "built for another torch or CUDA" in told
    assert "undefined symbol: _ZN3c105Error" in told


def test_missing_dependency_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_deepgemm(tmp_path, monkeypatch, "import tvm_ffi", DRAINED)
    told = reasons(Gemm.FORWARD)
    assert "needs the module 'tvm_ffi'" in told
    assert "pip install apache-tvm-ffi" in told


def test_an_import_that_raises_anything_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_deepgemm(tmp_path, monkeypatch, "assert None is not None, 'no CUDA_HOME'", DRAINED)
    told = reasons(Gemm.FORWARD)
    assert "Import of deep_gemm fails: AssertionError: no CUDA_HOME" in told
    assert "set CUDA_HOME" in told


@pytest.mark.parametrize(("source", "affected"), [(M_GROUPED, {Gemm.WGRAD}), (K_GROUPED, {Gemm.FORWARD, Gemm.DGRAD})])
def test_missing_symbols_affect_their_gemms_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, affected: set[Gemm]
) -> None:
    install_fake_deepgemm(tmp_path, monkeypatch, source, DRAINED)
    for gemm in Gemm:
        assert ("has no " in reasons(gemm)) == (gemm in affected)


@pytest.mark.parametrize("kernel", ["tensor_map_release();", None], ids=["no drain", "no source"])
def test_racy_build_is_refused_for_wgrad_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str | None
) -> None:
    install_fake_deepgemm(tmp_path, monkeypatch, M_GROUPED + K_GROUPED, kernel)
    assert "Known-racy build" in reasons(Gemm.WGRAD)
    assert reasons(Gemm.FORWARD) == reasons(Gemm.DGRAD) == ""


@pytest.mark.parametrize(
    ("capability", "told"), [(None, "No NVIDIA GPU"), ((8, 0), "compute capability 8.0"), ((10, 0), "capability 10.0")]
)
def test_wrong_hardware_is_told_and_deepgemm_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, told: str
) -> None:
    install_fake_deepgemm(tmp_path, monkeypatch, "raise RuntimeError('imported')", DRAINED)
    assert told in reasons(Gemm.FORWARD, capability)


@pytest.mark.parametrize(
    ("capability", "told"), [(None, "No NVIDIA GPU"), ((8, 9), "compute capability 8.9"), ((10, 0), "capability 10.0")]
)
def test_own_kernels_tell_wrong_hardware(capability: tuple[int, int] | None, told: str) -> None:
    (missing,) = triton_gemm.missing_for_triton(capability)
    assert told in str(missing)
    assert "Fix: run on an H100 or H200." in str(missing)


def test_own_kernels_lack_nothing_on_hopper() -> None:
    assert triton_gemm.missing_for_triton(HOPPER) == ()


@pytest.fixture
def other_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets what was found out about the installed Triton, before and after."""
    triton_gemm._missing_in_triton.cache_clear()
    yield monkeypatch
    triton_gemm._missing_in_triton.cache_clear()


def test_own_kernels_tell_an_old_triton(other_triton: pytest.MonkeyPatch) -> None:
    other_triton.setattr("triton.__version__", "3.5.1")
    assert "Triton 3.5.1 is too old" in " ".join(map(str, triton_gemm.missing_for_triton(HOPPER)))


def test_own_kernels_tell_a_gluon_they_do_not_know(other_triton: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ImportError(f"no {name}")

    other_triton.setattr("importlib.import_module", import_module)
    told = " ".join(map(str, triton_gemm.missing_for_triton(HOPPER)))
    assert "has a Gluon that these kernels do not know (no fp8moe.kernels.sm90.ring)" in told
    assert "Fix: install a Triton from 3.6 to 3.9." in told


def test_explain_on_cpu() -> None:
    explanation = fp8moe.explain("cpu")
    text = str(explanation)
    assert {selected.backend for selected in explanation.selected.values()} == {KernelPreference.EMULATED}
    assert "forward  EMULATED: no FP8 tensor cores" in text
    assert "DEEPGEMM not usable" in text
    assert "No NVIDIA GPU" in text
    assert "EMULATED usable" in text


@pytest.mark.parametrize("preference", [KernelPreference.DEEPGEMM, KernelPreference.TRITON])
def test_explicit_preference_never_falls_back(preference: KernelPreference) -> None:
    config = FP8Config(kernel_preference=preference)
    assert "cannot run: an explicit preference never falls back" in str(fp8moe.explain("cpu", config))
    a, b = torch.randn(4, 128), torch.randn(1, 128, 128)
    with pytest.raises(BackendUnavailableError, match=f"{preference} cannot compute forward on cpu: .*Fix: "):
        fp8moe.grouped_mm(a, b, torch.tensor([4], dtype=torch.int32), config=config)


class Backend:
    """Lacks some GEMMs."""

    fastest_token_tile: int
    """That of the backend in whose place it is."""

    def __init__(self, *lacking: Gemm, any_size: bool = True) -> None:
        self.lacking, self.any_size = lacking, any_size

    def missing(self, gemm: Gemm, device: torch.device) -> tuple[str, ...]:
        return (f"It lacks {gemm.value}.",) if gemm in self.lacking else ()

    def missing_for_sizes(self, gemm: Gemm, n: int, k: int) -> tuple[Missing, ...]:
        return () if self.any_size else DeepGemm().missing_for_sizes(gemm, n, k)


FakeBackends = Callable[..., None]


@pytest.fixture
def gpu_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackends]:
    """As if there were a GPU of this name with these backends."""

    def install(deepgemm: Backend, triton: Backend, name: str = "NVIDIA H200") -> None:
        deepgemm.fastest_token_tile, triton.fastest_token_tile = (
            backend.fastest_token_tile for backend in (DeepGemm, triton_gemm.TritonGemm)
        )
        monkeypatch.setitem(select.BACKENDS, KernelPreference.DEEPGEMM, deepgemm)
        monkeypatch.setitem(select.BACKENDS, KernelPreference.TRITON, triton)
        monkeypatch.setattr(tuning, "device_name", lambda device: name)

    monkeypatch.setenv("FP8MOE_TUNING", "/nowhere/tuning.json")
    forget_decisions()
    yield install
    forget_decisions()


def forget_decisions() -> None:
    for cached in (tuning._deciding_model, select._names_for_device_once, select._decide_once):
        cached.cache_clear()


@pytest.fixture
def gpu_without_fp8_backend(gpu_with: FakeBackends) -> None:
    """As if there were a GPU on which no FP8 backend can run."""
    gpu_with(Backend(*Gemm), Backend(*Gemm))


LARGE, SMALL = (32768, 4096, 7168, 8), (1024, 768, 768, 8)
"""FP8 pays for the first, not for the second."""


def select_for(shape: tuple[int, int, int, int], config: FP8Config) -> str:
    """The names of the backends of a product, or "bf16"."""
    backends = backends_for(config, torch.device("cuda:0"), shape)
    return "bf16" if backends is None else ",".join(backend.value for backend in backends)


@pytest.mark.usefixtures("gpu_without_fp8_backend")
def test_auto_takes_bf16_on_a_gpu_without_fp8_backend() -> None:
    assert select_for(LARGE, FP8Config()) == "bf16"
    explanation = fp8moe.explain("cuda:0", shape=LARGE)
    assert "BF16 grouped_mm: no FP8 backend can run here" in str(explanation.selected[Gemm.FORWARD])
    assert "cost model" not in str(explanation)


@pytest.mark.usefixtures("gpu_without_fp8_backend")
def test_auto_emulates_with_one_warning_where_bf16_is_forbidden() -> None:
    with pytest.warns(UserWarning, match=r"emulates FP8 on this GPU.*pip install sgl-deep-gemm"):
        assert select_for(LARGE, FP8Config(allow_bf16=False)) == "emulated,emulated,emulated"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_for(LARGE, FP8Config(allow_bf16=False))


@pytest.mark.parametrize(
    ("deepgemm", "triton", "expected"),
    [
        (Backend(), Backend(), "triton,triton,triton"),
        (Backend(), Backend(*Gemm), "deepgemm,deepgemm,deepgemm"),
        (Backend(), Backend(Gemm.DGRAD), "triton,deepgemm,triton"),
        (Backend(), Backend(Gemm.WGRAD), "triton,triton,deepgemm"),
        (Backend(Gemm.FORWARD), Backend(Gemm.FORWARD), "bf16"),
    ],
)
def test_auto_takes_the_fastest_that_can_for_each_gemm(
    gpu_with: FakeBackends, deepgemm: Backend, triton: Backend, expected: str
) -> None:
    gpu_with(deepgemm, triton)
    assert select_for(LARGE, FP8Config()) == expected
    assert select_for(SMALL, FP8Config()) == "bf16"


@pytest.mark.parametrize("preference", ["deepgemm", "triton", "emulated"])
def test_an_explicit_preference_is_met_for_all_sizes(gpu_with: FakeBackends, preference: str) -> None:
    gpu_with(Backend(), Backend())
    config = FP8Config(kernel_preference=KernelPreference(preference))
    for shape in (SMALL, LARGE):
        assert select_for(shape, config) == ",".join([preference] * 3)


def test_auto_never_takes_bf16_where_it_is_forbidden(gpu_with: FakeBackends) -> None:
    gpu_with(Backend(), Backend())
    assert select_for(SMALL, FP8Config(allow_bf16=False)) == "triton,triton,triton"
    assert fp8moe.explain("cuda:0", FP8Config(allow_bf16=False), shape=SMALL).decider is None


def test_every_gemm_is_ranked_and_only_by_what_there_is() -> None:
    assert set(select.RANKINGS) == set(Gemm)
    for ranking in select.RANKINGS.values():
        assert set(ranking.backends) == set(select.BACKENDS) - {KernelPreference.EMULATED}


def test_explain_tells_what_decides_and_why(gpu_with: FakeBackends) -> None:
    gpu_with(Backend(), Backend())
    text = str(fp8moe.explain("cuda:0", shape=LARGE))
    assert "forward  TRITON: first of TRITON, DEEPGEMM that can run here (on an H200 TRITON beats" in text
    assert "wgrad    TRITON: first of TRITON, DEEPGEMM that can run here (on an H200 TRITON is" in text
    assert "cost model: shipped for NVIDIA H200; measured 20" in text
    assert re.search(r"grouped_mm .* = \(32768, 4096, 7168, 8\), forward and backward: BF16 \d+ us, FP8 \d+ us", text)
    text = str(fp8moe.explain("cuda:0", shape=SMALL))
    assert "wgrad    BF16 grouped_mm: FP8 is not predicted to take 3% less time for these sizes" in text
    launched = r"us \(for the host to launch it; the device takes \d+ us\)"
    assert re.search(rf"BF16 \d+ {launched}, FP8 \d+ {launched}", text)
    text = str(fp8moe.explain("cuda:0"))
    assert "forward  TRITON" in text
    assert "cost model: shipped" in text
    assert "forward and backward" not in text


def test_explain_of_layers_and_of_cached_weights(gpu_with: FakeBackends) -> None:
    gpu_with(Backend(), Backend())
    layer = (2048, 8, 2048, 768, 128)
    never, weights = Cost(0, 0, 0, 0), 3 * 128 * 2048 * 768
    costs = Costs(bf16=Cost(100, 1e-6, 1e-6, 0), fp8=Cost(120, 1e-6, 1e-6, 0), fp8_cached=Cost(100, 1e-6, 5e-7, 0))
    with tuning.decided_by(CostModel("", "today", product=Costs(never, costs.fp8, costs.fp8), layer=costs)):
        plain, cached = (fp8moe.explain("cuda:0", layer=layer, weight_cache=cached) for cached in (False, True))
    assert {selected.backend for selected in plain.selected.values()} == {None}
    assert {selected.backend for selected in cached.selected.values()} == {KernelPreference.TRITON}
    assert "layer (T, k, H, I, E) = (2048, 8, 2048, 768, 128), weights cached, forward and backward" in str(cached)
    assert plain.prediction is not None
    assert cached.prediction is not None
    rows = 2048 * 8 * (2 * 768 + 2048 + 2048 + 768)
    assert plain.prediction.bf16_us == cached.prediction.bf16_us == pytest.approx(100 + 1e-6 * (rows + weights))
    assert plain.prediction.fp8_us == pytest.approx(120 + 1e-6 * (rows + weights))
    assert cached.prediction.fp8_us == pytest.approx(100 + 1e-6 * (rows + weights / 2))


@pytest.mark.parametrize("shape", [(65536, 2048, 768, 16), (65536, 1536, 2048, 16), (32768, 2048, 2048, 64)])
@pytest.mark.parametrize("cached", [False, True])
def test_explain_tells_what_the_op_takes(
    gpu_with: FakeBackends, shape: tuple[int, int, int, int], cached: bool
) -> None:
    gpu_with(Backend(), Backend())
    explanation = fp8moe.explain("cuda:0", shape=shape, weight_cache=cached)
    sizes = OpSizes.of_product(*shape)
    backends = backends_for(FP8Config(), torch.device("cuda:0"), shape, cached=cached)
    assert [selected.backend for selected in explanation.selected.values()] == list(backends or [None] * 3)
    model = tuning.deciding_model(torch.device("cuda:0")).model
    assert (backends is not None) == fp8_pays(model.product, sizes.exact, cached, sizes.padded)


UNALIGNED = (32768, 4096, 7100, 8)
DEEPGEMM_ALONE = (Backend(any_size=False), Backend(*Gemm))


@pytest.mark.parametrize("shape", [UNALIGNED, (32768, 4100, 7168, 8)])
def test_auto_skips_a_backend_that_cannot_take_the_sizes(
    gpu_with: FakeBackends, shape: tuple[int, int, int, int]
) -> None:
    gpu_with(Backend(any_size=False), Backend())
    assert select_for(shape, FP8Config()) == "triton,triton,triton"
    gpu_with(*DEEPGEMM_ALONE)
    forget_decisions()  # which have seen TRITON
    assert select_for(LARGE, FP8Config()) == "deepgemm,deepgemm,deepgemm"
    assert select_for(shape, FP8Config()) == "bf16"
    assert select_for(shape, FP8Config(allow_bf16=False)) == "emulated,emulated,emulated"
    selected = fp8moe.explain("cuda:0", shape=shape).selected[Gemm.FORWARD]
    assert selected.backend is None
    assert "takes only multiples of 128" in selected.reason


def test_an_explicit_backend_that_cannot_take_the_sizes_is_refused(gpu_with: FakeBackends) -> None:
    gpu_with(*DEEPGEMM_ALONE)
    config = FP8Config(kernel_preference=KernelPreference.DEEPGEMM)
    assert select_for(LARGE, config) == "deepgemm,deepgemm,deepgemm"
    with pytest.raises(
        fp8moe.BackendUnavailableError, match=r"DEEPGEMM cannot compute .* sizes 4096 and 7100\. Fix: name .*TRITON"
    ):
        select_for(UNALIGNED, config)
    assert backends_for(config, torch.device("cuda:0"), UNALIGNED, needs_wgrad=False) is not None
    explanation = fp8moe.explain("cuda:0", config, shape=UNALIGNED)
    assert not explanation.selected
    assert "the weight has the sizes 4096 and 7100" in str(explanation)


def test_explain_tells_what_padding_costs(gpu_with: FakeBackends) -> None:
    gpu_with(Backend(), Backend())
    shape = (65536, 2880, 2880, 32)
    explanation = fp8moe.explain("cuda:0", shape=shape)
    assert "sizes: FP8 pads 2880 to 2944, which adds 4.5% to the products" in str(explanation)
    assert explanation.prediction is not None
    costs = explanation.prediction.costs
    assert explanation.prediction.bf16_us == costs.bf16.predict_us(OpSize.of_product(*shape))
    assert explanation.prediction.fp8_us == costs.fp8.predict_us(OpSize.of_product(65536, 2944, 2944, 32))
    layer = fp8moe.explain("cpu", layer=(100, 2, 2880, 1407, 8))
    assert "sizes: FP8 pads 2880 to 2944 and 1407 to 1408, which adds 2.3% to the products" in str(layer)
    assert "sizes:" not in str(fp8moe.explain("cpu", shape=(0, 256, 128, 4)))
    assert "FP8 pads 200 to 256" in str(fp8moe.explain("cpu", shape=(0, 200, 128, 4)))


def test_another_gpu_is_told_to_be_judged_by_the_h200(gpu_with: FakeBackends) -> None:
    gpu_with(Backend(), Backend(), name="NVIDIA H100 PCIe")
    explanation = fp8moe.explain("cuda:0", shape=LARGE)
    assert explanation.selected[Gemm.WGRAD].backend is KernelPreference.TRITON
    assert (
        "cost model: shipped for NVIDIA H200, as there is none for NVIDIA H100 PCIe "
        "(python -m fp8moe tune measures one)" in str(explanation)
    )


def test_explain_refuses_what_it_cannot_explain() -> None:
    with pytest.raises(TypeError, match="config is 'auto'; it must be an FP8Config"):
        fp8moe.explain("cpu", "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device is 'meta'; it must be cpu or cuda"):
        fp8moe.explain("meta")
    with pytest.raises(ValueError, match=r"shape is \(1, 128, 128, 1\) and layer is .*; give one of them"):
        fp8moe.explain("cpu", shape=(1, 128, 128, 1), layer=(1, 1, 128, 128, 1))
