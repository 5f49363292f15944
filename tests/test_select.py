"""Which backend is chosen, and what a user is told of the others."""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fp8moe
from fp8moe import BackendUnavailableError, FP8Config, KernelPreference
from fp8moe.gemm import deepgemm_probe, select
from fp8moe.gemm import triton as triton_gemm
from fp8moe.gemm.base import Gemm

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
    assert "has another Gluon than these kernels know (no fp8moe.gemm.hopper.ring)" in told
    assert "Fix: install a Triton from 3.6 to 3.9." in told


def test_explain_on_cpu() -> None:
    explanation = fp8moe.explain("cpu")
    text = str(explanation)
    assert {choice.backend for choice in explanation.choices.values()} == {KernelPreference.EMULATED}
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


@pytest.fixture
def gpu_without_fp8_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were a GPU on which no FP8 backend can run."""
    monkeypatch.setattr(select, "BACKENDS", {KernelPreference.EMULATED: select.BACKENDS[KernelPreference.EMULATED]})
    select._selected_backends.cache_clear()
    yield
    select._selected_backends.cache_clear()


@pytest.mark.usefixtures("gpu_without_fp8_backend")
def test_auto_takes_bf16_on_a_gpu_without_fp8_backend() -> None:
    assert select.selected_backends("cuda:0", "auto", True, True) == "bf16"
    text = str(select.choose(torch.device("cuda:0"), KernelPreference.AUTO, True, True)[Gemm.FORWARD])
    assert "BF16 grouped_mm: no FP8 backend can run here" in text


@pytest.mark.usefixtures("gpu_without_fp8_backend")
def test_auto_emulates_with_one_warning_where_bf16_is_forbidden() -> None:
    with pytest.warns(UserWarning, match=r"emulates FP8 on this GPU.*pip install sgl-deep-gemm"):
        assert select.selected_backends("cuda:0", "auto", False, True) == "emulated,emulated,emulated"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select.selected_backends("cuda:0", "auto", False, True)


def test_auto_takes_the_first_backend_that_can_for_each_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForwardOnly:
        def missing(self, gemm: Gemm, device: torch.device) -> tuple[str, ...]:
            return () if gemm is not Gemm.WGRAD else ("wgrad",)

    class Everything(ForwardOnly):
        def missing(self, gemm: Gemm, device: torch.device) -> tuple[str, ...]:
            return ()

    monkeypatch.setitem(select.BACKENDS, KernelPreference.DEEPGEMM, ForwardOnly())
    monkeypatch.setitem(select.BACKENDS, KernelPreference.TRITON, Everything())
    choices = select.choose(torch.device("cuda:0"), KernelPreference.AUTO, True, True)
    assert choices[Gemm.FORWARD].backend is choices[Gemm.DGRAD].backend is KernelPreference.DEEPGEMM
    assert choices[Gemm.WGRAD].backend is KernelPreference.TRITON
    for choice in select.choose(torch.device("cuda:0"), KernelPreference.AUTO, True, False).values():
        assert choice.backend is None
        assert "FP8 is faster only where M * N * K" in choice.reason
    assert select.choose(torch.device("cuda:0"), KernelPreference.AUTO, False, False) == choices


@pytest.mark.parametrize(
    ("shape", "pays"),
    [
        ((32768, 4096, 7168, 8), True),
        ((65536, 1536, 2048, 16), True),
        ((16384, 28672, 4096, 8), True),
        ((65536, 2048, 768, 16), False),
        ((32768, 2048, 2048, 64), False),
        ((0, 128, 128, 1), False),
    ],
)
def test_fp8_pays_for_large_products_of_many_rows_an_expert(shape: tuple[int, int, int, int], pays: bool) -> None:
    assert select.fp8_pays(*shape) == pays


def test_explain_refuses_what_it_cannot_explain() -> None:
    with pytest.raises(TypeError, match="config is 'auto'; it must be an FP8Config"):
        fp8moe.explain("cpu", "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device is 'meta'; it must be cpu or cuda"):
        fp8moe.explain("meta")
