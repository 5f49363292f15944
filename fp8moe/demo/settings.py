"""What a run is: its sizes, its schedule, its data. Every field is a flag of `python -m fp8moe train`."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from fp8moe import FP8Config, KernelPreference

Precision = Literal["fp8", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BACKENDS = tuple(preference.value for preference in KernelPreference)


def option(default: Any, help: str) -> Any:
    """A field with a default and the sentence that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the model.

    Raises:
        ValueError: a size is out of range or does not fit another; the message names it, its value and the fix.
    """

    layers: int = option(2, "decoder layers")
    hidden: int = option(128, "model width, a multiple of 128")
    intermediate: int = option(128, "width of one expert, a multiple of 128")
    experts: int = option(8, "experts in each layer")
    top_k: int = option(2, "experts chosen for each token")
    heads: int = option(4, "attention heads")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "layers", "hidden", "intermediate", "experts", "top_k", "heads")
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if size % 128:
                raise ValueError(f"{name} is {size}; FP8 scales cover 128 values: use {-(-size // 128) * 128}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.experts} experts: lower it or raise experts")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads is {self.heads}, which does not divide hidden={self.hidden} into heads of even width: "
                "use a power of two"
            )


@dataclass(frozen=True)
class RunConfig:
    """All that decides the losses of a run. Saved with it, so that `--resume` continues the same run.

    Raises:
        ValueError: a value is out of range; the message names it, its value and the fix.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: tuple[Precision, ...] = option(PRECISIONS, "what to train, in this order, on the same data")
    backend: str = option("auto", "what computes the FP8 GEMMs")
    data: str | None = option(None, "file or directory of text; by default the source of Python's standard library")
    seq_len: int = option(128, "bytes in a training sequence")
    batch_size: int = option(8, "sequences in a step")
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
    compile: bool = option(False, "run the model through torch.compile")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "seq_len", "batch_size", "steps", "eval_batches")
        _require_at_least(self, 0, "warmup", "weight_decay", "balance_weight", "seed", "eval_every", "checkpoint_every")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}; it must be positive, as in 3e-3")
        if not self.precision or sorted(self.precision) != sorted(set(self.precision) & set(PRECISIONS)):
            raise ValueError(
                f"precision is {','.join(self.precision)!r}; it must name one or more of {', '.join(PRECISIONS)}, "
                "each once, as in fp8,bf16"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; it must be one of {', '.join(BACKENDS)}")

    @property
    def fp8(self) -> FP8Config:
        """The library's configuration. FP8 always means FP8 here: where no kernel can run it, it is emulated."""
        return FP8Config(kernel_preference=KernelPreference(self.backend), allow_bf16=False)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "RunConfig":
        return cls(**(saved | {"model": ModelConfig(**saved["model"]), "precision": tuple(saved["precision"])}))

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "RunConfig":
        """From a flat mapping of field names, of the run or of its model, to values; what is left out is default."""
        sizes = {name: options[name] for name in MODEL_OPTIONS if name in options}
        return cls(model=ModelConfig(**sizes), **{name: options[name] for name in RUN_OPTIONS if name in options})

    def option(self, name: str) -> Any:
        """The value of an option, of the run or of its model."""
        return getattr(self.model if name in MODEL_OPTIONS else self, name)


MODEL_OPTIONS = {entry.name: entry for entry in fields(ModelConfig)}
RUN_OPTIONS = {entry.name: entry for entry in fields(RunConfig) if entry.metadata}


def _require_at_least(config: ModelConfig | RunConfig, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not least <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be at least {least}")
