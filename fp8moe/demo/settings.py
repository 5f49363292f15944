"""What a run is: its sizes, its schedule, its data. Every field is a flag of `python -m fp8moe train`."""

from argparse import BooleanOptionalAction
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fp8moe import ActivationStorage, FP8Config, KernelPreference, ScaleFormat
from fp8moe.config import TOKEN_TILES

Precision = Literal["fp8", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def option(default: Any, help: str, **parsing: Any) -> Any:
    """A field with a default, and what `argparse` must know of its flag."""
    about = help if default is None else f"{help} (default: {default})"
    kind = {"action": BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
    return field(default=default, metadata={"help": about} | kind | parsing)


@dataclass(frozen=True)
class RunConfig:
    """All that decides the losses of a run. Saved with it, so that `--resume` continues the same run.

    Raises:
        ValueError: a value is out of range or does not fit another; the message names it, its value and the fix.
    """

    layers: int = option(2, "decoder layers")
    hidden: int = option(128, "model width, a multiple of 8")
    intermediate: int = option(128, "width of one expert, a multiple of 8")
    experts: int = option(8, "experts in each layer")
    top_k: int = option(2, "experts chosen for each token")
    heads: int = option(4, "attention heads")
    precision: str = option(
        "fp8,bf16",
        "what to train, in this order, on the same data",
        choices=("fp8,bf16", "bf16,fp8", "fp8", "bf16"),
        metavar="PRECISION",
    )
    backend: str = option("auto", "what computes the FP8 GEMMs", choices=[kind.value for kind in KernelPreference])
    token_tile: int | None = option(
        None,
        "FP8: tokens that share a scale in the weight gradient: 128, 256 or 512 (default: FP8Config's, 256 where that "
        "is faster)",
        type=int,
    )
    scale_format: str = option("fp32", "FP8: values that scales take", choices=[kind.value for kind in ScaleFormat])
    activation_storage: str = option(
        "bf16", "FP8: how backward's largest tensor is kept", choices=[kind.value for kind in ActivationStorage]
    )
    keep_quantized_weights: bool = option(False, "FP8: keep a quantized weight from forward to backward")
    cache_weights: bool = option(False, "FP8: quantize a weight once a step, for all its microbatches")
    data: str | None = option(
        None,
        "UTF-8 file, or directory of which the UTF-8 files are read, or tokens that scripts/build_corpus.py made "
        "(default: the source of Python's standard library)",
        type=lambda text: str(Path(text).absolute()),  # a run may be resumed from another directory
    )
    seq_len: int = option(128, "bytes or tokens in a training sequence")
    batch_size: int = option(8, "sequences in a step")
    microbatches: int = option(1, "parts of a step, whose gradients are added up")
    steps: int = option(700, "optimizer steps; the learning rate falls to zero over them")
    lr: float = option(5e-3, "peak learning rate of AdamW")
    warmup: int = option(100, "steps over which the learning rate rises to its peak")
    weight_decay: float = option(0.1, "weight decay of the matrices")
    balance_weight: float = option(0.01, "weight of the load-balancing loss")
    seed: int = option(0, "seed of the parameters and of the data order")
    eval_every: int = option(200, "steps between validations; 0: after the last step alone")
    eval_batches: int = option(32, "batches in a validation")
    checkpoint_every: int = option(200, "steps between checkpoints; 0: after the last step alone")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: CUDA if there is a GPU")
    compile: bool = option(False, "run all but the FP8 experts through torch.compile")
    deterministic: bool = option(
        True, "let PyTorch take algorithms that repeat their bits, so that runs resume exactly"
    )
    bad_documents: float = option(0.0, "stress: share of the sequences that are a few odd tokens over and over")
    dead_experts: int = option(0, "stress: experts in each layer that are never chosen")

    def __post_init__(self) -> None:
        positive = ("layers", "hidden", "intermediate", "experts", "top_k", "heads", "seq_len", "batch_size", "steps")
        self._require_at_least(1, *positive, "eval_batches", "microbatches")
        self._require_at_least(0, "warmup", "weight_decay", "balance_weight", "seed", "eval_every", "checkpoint_every")
        self._require_at_least(0, "bad_documents", "dead_experts")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be positive, as in 3e-3")
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if size % 8:
                raise ValueError(
                    f"{name} is {size}; PyTorch's grouped_mm takes multiples of 8: use {-(-size // 8) * 8}"
                )
        alive = self.experts - self.dead_experts
        if self.top_k > alive:
            raise ValueError(f"top_k is {self.top_k}, more than the {alive} experts: lower it or raise experts")
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches is {self.microbatches}, which does not divide batch_size={self.batch_size}")
        if not self.bad_documents <= 1:
            raise ValueError(f"bad_documents is {self.bad_documents}; it is a share, at most 1")
        if self.token_tile is not None and self.token_tile not in TOKEN_TILES:
            raise ValueError(f"token_tile is {self.token_tile}; it must be one of {TOKEN_TILES}, or None")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads is {self.heads}, which does not divide hidden={self.hidden} into heads of even width: "
                "use a power of two"
            )

    def _require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return cast(tuple[Precision, ...], tuple(self.precision.split(",")))

    @property
    def fp8(self) -> FP8Config:
        """The library's configuration. FP8 always means FP8 here: where no kernel can run it, it is emulated."""
        return FP8Config(
            kernel_preference=KernelPreference(self.backend),
            scale_format=ScaleFormat(self.scale_format),
            activation_storage=ActivationStorage(self.activation_storage),
            allow_bf16=False,
            wgrad_token_tile=self.token_tile,
            keep_quantized_weights=self.keep_quantized_weights,
        )
