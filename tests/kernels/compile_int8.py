"""Compile the kernels of `fp8moe.int8` for a GPU, with none: `python -m tests.kernels.compile_int8 cuda:80`.

Prints a line of JSON for each variant; with a second argument such as 20 for every 20th, and those of few programs.
"""

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fp8moe.kernels.int8.platform import HOPPER, NVIDIA, PORTABLE
from tests.kernels.compile_for_hopper import OfflineDriver, resources
from tests.kernels.int8_launches import FEW_PROGRAMS, int8_launches

TARGETS = {
    "cuda:80": (GPUTarget("cuda", 80, 32), NVIDIA),
    "cuda:89": (GPUTarget("cuda", 89, 32), NVIDIA),
    "cuda:90": (GPUTarget("cuda", 90, 32), HOPPER),
    "hip:gfx90a": (GPUTarget("hip", "gfx90a", 64), PORTABLE),
    "hip:gfx942": (GPUTarget("hip", "gfx942", 64), PORTABLE),
}


def main() -> None:
    target, platform = TARGETS[sys.argv[1]]
    every = int(sys.argv[2]) if len(sys.argv) > 2 else 1

    class Driver(OfflineDriver):
        def get_current_target(self) -> GPUTarget:
            return target

    triton.runtime.driver.set_active(Driver())
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if target.backend == "cuda":
            usage = resources(kernel.asm["cubin"])
        else:
            usage = {"mfma": kernel.asm["amdgcn"].count("v_mfma")}
        row = {"kernel": self.__name__, "variant": variant, "shared": kernel.metadata.shared, **usage}
        sys.stdout.write(json.dumps(row) + "\n")

    JITFunction.run = run
    for number, (variant, launch) in enumerate(int8_launches(platform)):
        if number % every == 0 or FEW_PROGRAMS in variant:
            launch()


if __name__ == "__main__":
    main()
