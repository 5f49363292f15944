"""The user's choices: kernels, scale format, storage, accuracy and checks."""

from dataclasses import dataclass, fields
from enum import Enum


class KernelPreference(Enum):
    """Which backend computes the grouped GEMMs. An explicit preference never falls back silently."""

    AUTO = "auto"
    """The way that is predicted to be the fastest on the device for the sizes of the op, launched from Python. (`python
    -m fp8moe tune` measures what the prediction is made from.) In CUDA graphs the host does not count, and FP8 pays for
    smaller sizes: name a backend there. In compiled code only the device may know a size, as that of the rows after an
    all-to-all: then AUTO takes FP8. It never raises because a kernel is missing (see `FP8Config.allow_bf16`)."""
    DEEPGEMM = "deepgemm"
    """DeepGEMM's kernels; `BackendUnavailableError` if they cannot be used."""
    TRITON = "triton"
    """The project's own kernels; `BackendUnavailableError` if they cannot be used."""
    EMULATED = "emulated"
    """Quantize, dequantize, multiply in fp32. It runs anywhere, slowly; the other backends are tested against it."""


class ScaleFormat(Enum):
    """What values a dequantization scale may take. Both are stored as fp32."""

    FP32 = "fp32"
    """`amax / 448`, any fp32 value: the most accurate."""
    POW2 = "pow2"
    """`amax / 448` rounded up to a power of two: what hardware with UE8M0 scales takes."""


class ActivationStorage(Enum):
    """How an expert MLP saves the input of SwiGLU, `(rows, 2I)`, for backward. No saved tensor is larger."""

    BF16 = "bf16"
    """As the GEMM wrote it."""
    FP8 = "fp8"
    """In E4M3 with a scale for each 1 x 128 tile: half the memory, noisier gradients, and about 1% of a
    layer's time."""


TOKEN_TILES = (128, 256, 512)
"""What `FP8Config.wgrad_token_tile` may be."""


@dataclass(frozen=True)
class FP8Config:
    """How an FP8 op computes. Frozen and hashable, so it can key caches and pass through `torch.compile`.

    Every default is right for most people.

    Raises:
        TypeError: a field is not of its type; the message names the field, the value and what it must be.
        ValueError: `wgrad_token_tile` is none of `TOKEN_TILES`.
    """

    kernel_preference: KernelPreference = KernelPreference.AUTO
    """The backend; `fp8moe.explain()` tells what it means on a device."""
    scale_format: ScaleFormat = ScaleFormat.FP32
    """The format of every scale: activations, gradients and weights."""
    activation_storage: ActivationStorage = ActivationStorage.BF16
    """What `swiglu_experts` and `moe_forward` keep for backward; `grouped_mm` keeps its input in FP8 in any case."""
    allow_bf16: bool = True
    """Whether AUTO may run the whole op in BF16 on a CUDA device where FP8 cannot run or would not be faster."""
    debug: bool = False
    """Also check what only the device can see, which takes time: that `offs` never decreases and ends within the
    rows; with `assume_full`, with the last row. A violation raises `ValueError` on a CPU and is a device-side assertion
    on CUDA."""
    assume_full: bool = False
    """Your promise, to `grouped_mm` and `swiglu_experts`, that `offs` never decreases and that `offs[-1]` is the number
    of rows. Where AUTO takes BF16, it saves the launches that would correct offsets and zero the rows of no group: a
    product then costs little more than PyTorch's own. If the promise is broken, the results are unspecified, and memory
    may be read out of bounds. FP8 gains nothing, and corrects offsets all the same."""
    wgrad_token_tile: int | None = None
    """How many tokens of an expert share a scale, feature by feature, in the activations that wgrad contracts: 128, 256
    or 512. Gradients keep 128. With more than 128, wgrad applies these scales less often, and is a fifth faster with
    `KernelPreference.TRITON` (which AUTO takes on Hopper) where the gradient is made `(E, N, K)`: of weights stored so,
    of pairs, and for `main_grads`. In other cases nothing is gained, and quantizing takes longer. None, the default, is
    256 where that is faster, else 128. (EMULATED takes what TRITON would.) 128 is the strict recipe of DeepSeek-V3. See
    docs/performance.md for the evidence, and for the cost in accuracy. A long tile whose largest magnitude is below
    2**-60 counts as zeros."""

    keep_quantized_weights: bool = False
    """Whether forward makes both FP8 forms of a weight from one read, and keeps the one for backward until then: 1 byte
    an element, for a third less time to quantize weights. By default backward quantizes the weight again, and nothing
    is kept. With activation checkpointing keeping it costs next to no memory: backward follows, layer by layer. A
    `WeightCache` makes it pointless."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is None:
                if value is not None and not isinstance(value, int):
                    raise TypeError(f"FP8Config.{field.name} is {value!r}; it must be an int or None")
            elif not isinstance(value, type(field.default)):
                expected = type(field.default)
                choices = f" ({', '.join(str(member) for member in expected)})" if issubclass(expected, Enum) else ""
                raise TypeError(f"FP8Config.{field.name} is {value!r}; it must be a {expected.__name__}{choices}")
        if self.wgrad_token_tile is not None and self.wgrad_token_tile not in TOKEN_TILES:
            raise ValueError(
                f"FP8Config.wgrad_token_tile is {self.wgrad_token_tile}; it must be one of {TOKEN_TILES}, or None for "
                "256 where that is faster"
            )


def check_config(config: object) -> None:
    """`config` must be an `FP8Config`."""
    if not isinstance(config, FP8Config):
        raise TypeError(f"config is {config!r}; it must be an FP8Config, such as FP8Config(debug=True)")
