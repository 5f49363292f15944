"""What fp8moe takes from transformers, of a version that it knows.

Raises:
    ImportError: transformers is missing, or of another version.
"""

try:
    import transformers

    if not (5, 24) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (6, 0):
        raise ImportError(f"found {transformers.__version__}")
    from transformers.distributed.expert_parallel import AutoEP, EPImplementation, EPImplementationInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
except ImportError as error:
    raise ImportError(
        f"fp8moe.integrations.transformers needs transformers 5.24 or newer, below 6 ({error}): "
        "pip install 'transformers>=5.24,<6'"
    ) from error

default_apply_gate = _default_apply_gate

__all__ = ["ALL_EXPERTS_FUNCTIONS", "AutoEP", "EPImplementation", "EPImplementationInterface", "default_apply_gate"]
