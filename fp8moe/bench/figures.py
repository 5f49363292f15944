"""What is measured of a problem: the figures of every variant and kernel, or why there are none."""

from dataclasses import dataclass

from fp8moe.bench.shapes import Balance, Shape
from fp8moe.bench.timing import Timing


@dataclass(frozen=True)
class Failure:
    """A variant or kernel that raised, or computed something wrong: it has no figures."""

    name: str
    is_ours: bool
    error: str


@dataclass(frozen=True)
class Checked:
    """What is known of a variant before it is timed."""

    name: str
    computed_by: str
    sqnr_db: dict[str, float]
    """Against the reference in BF16, of the output and each gradient."""
    saved_row_bytes: int
    """Saved for backward, growing with the rows."""


@dataclass(frozen=True)
class Measurement(Checked):
    """The figures of one variant."""

    forward: Timing
    """As in training: with what backward needs made and saved."""
    backward: Timing
    """Right after forward."""
    both: Timing
    graph: Timing | None
    """`both` replayed from a CUDA graph."""
    no_graph_because: str | None
    peak_bytes: int | None
    """Above what was held before, over forward and backward, output and gradients included; None on a CPU."""
    host_us: float | None
    """Microseconds until forward and backward return to the caller, in a loop that runs ahead of the device; None on a
    CPU, where that is `both`."""
    compared_with: str
    """The fastest of PyTorch's ways in BF16: of a variant with `main_grad`s the fastest of those that have them too."""
    speed_against_bf16: float
    """Its time for forward and backward over the variant's: above 1 is faster than BF16."""
    saved_against_bf16: float
    """What the variant saves for backward that grows with the rows, over what it saves."""


@dataclass(frozen=True)
class KernelMeasurement:
    """The figures of one kernel."""

    name: str
    timing: Timing
    bytes: int
    """Each input and output byte once."""
    flops: int
    floor_ms: float | None
    sqnr_db: float
    """The least of its checks."""


@dataclass(frozen=True)
class Result:
    """All that was measured of one problem."""

    shape: Shape
    routing: Balance
    group_sizes: list[int]
    floor_ms: float | None
    """Of forward and backward in FP8; None without an FP8 rate."""
    bf16: Measurement
    """The fastest of PyTorch's ways."""
    variants: list[Measurement | Failure]
    """All but that, PyTorch's first."""
    kernels: list[KernelMeasurement | Failure]

    @property
    def failures(self) -> list[Failure]:
        """The variants and kernels that have no figures."""
        return [row for row in (*self.variants, *self.kernels) if isinstance(row, Failure)]
