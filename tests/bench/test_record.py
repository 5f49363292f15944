"""Where a run took place is written down."""

import torch

from fp8moe.bench.record import environment_of


def test_environment_of_a_cpu() -> None:
    environment = environment_of(torch.device("cpu"))
    assert environment.device.startswith("CPU (")
    assert environment.packages["torch"] is not None
    assert set(environment.packages) == {
        "fp8moe",
        "torch",
        "triton",
        "transformers",
        "torchao",
        "liger-kernel",
        "sgl-deep-gemm",
    }
