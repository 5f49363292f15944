"""What the installed `deep_gemm` lacks on this GPU, case by case, so that the user knows what to fix.

DeepGEMM is optional, compiled against one torch and CUDA, and ships as several builds of one name; some of them compute
wrong weight gradients. Nothing of it is used before it has passed these checks.
"""

import importlib
import importlib.util
from pathlib import Path

from fp8moe.gemm.base import Gemm, Missing, missing_hopper

INSTALL = "pip install sgl-deep-gemm (the extra 'deepgemm' of fp8moe); it needs an NVIDIA driver and nvcc."

_SYMBOLS = {
    Gemm.FORWARD: "m_grouped_fp8_gemm_nt_contiguous",
    Gemm.DGRAD: "m_grouped_fp8_gemm_nt_contiguous",
    Gemm.WGRAD: "k_grouped_fp8_gemm_nt_contiguous",
}
_WGRAD_KERNEL = Path("include", "deep_gemm", "impls", "sm90_fp8_gemm_1d1d.cuh")
_TENSOR_MAP_DRAIN = "tma_desc_wait_group"


def missing_in_deepgemm(gemm: Gemm, compute_capability: tuple[int, int] | None) -> tuple[Missing, ...]:
    """What the installed `deep_gemm` lacks for `gemm`; empty if nothing.

    Args:
        gemm: which GEMM it is to compute.
        compute_capability: the device's, or None where the device is not an NVIDIA GPU.
    """
    lacks = missing_hopper(compute_capability)
    if importlib.util.find_spec("deep_gemm") is None:
        lacks.append(Missing("The module deep_gemm is not installed.", INSTALL))
    elif not lacks:  # importing it starts CUDA, so only where it could run
        lacks.extend(_missing_in_module(gemm))
    return tuple(lacks)


def _missing_in_module(gemm: Gemm) -> list[Missing]:
    try:
        module = importlib.import_module("deep_gemm")
    except ModuleNotFoundError as error:
        return [Missing(f"Import of deep_gemm is broken: it needs the module {error.name!r}.", _install(error.name))]
    except (ImportError, OSError) as error:
        if "undefined symbol" in str(error) or "cannot open shared object" in str(error):
            reason = f"Import of deep_gemm is broken: it was built for another torch or CUDA than this one ({error})."
            return [Missing(reason, "install the build of sgl-deep-gemm that was made for this torch and CUDA.")]
        return [Missing(f"Import of deep_gemm is broken: {error}.", INSTALL)]
    except Exception as error:  # it asserts, looks for CUDA and may compile while it is imported
        reason = f"Import of deep_gemm fails: {type(error).__name__}: {error}."
        return [Missing(reason, "set CUDA_HOME to a CUDA toolkit with nvcc, and try `import deep_gemm` by itself.")]

    symbol = _SYMBOLS[gemm]
    if not callable(getattr(module, symbol, None)):
        reason = f"The installed deep_gemm has no {symbol}: it is too old, or built without it."
        return [Missing(reason, "install sgl-deep-gemm 0.1.4.post1 or newer.")]
    if gemm is Gemm.WGRAD:
        # The version string does not tell this; the source of the kernel, which is compiled at first use, does.
        source = Path(module.__file__ or "").parent / _WGRAD_KERNEL
        if not source.is_file() or _TENSOR_MAP_DRAIN not in source.read_text():
            reason = (
                "Known-racy build: the K-grouped kernel of the installed deep_gemm does not wait for its tensor maps "
                f"when it switches groups (no {_TENSOR_MAP_DRAIN} in {_WGRAD_KERNEL.name}): its results can be wrong."
            )
            return [Missing(reason, "install sgl-deep-gemm 0.1.4.post1 or newer.")]
    return []


def _install(module: str | None) -> str:
    package = {"tvm_ffi": "apache-tvm-ffi"}.get(module or "", module)
    return f"pip install {package}."
