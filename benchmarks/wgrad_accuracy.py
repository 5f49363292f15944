"""`python benchmarks/wgrad_accuracy.py`: what `FP8Config.wgrad_token_tile` costs in accuracy.

Weight gradients by each tile length, by `ScaleFormat.POW2`, and by 128 x 128 blocks (where other trainers save the
scales of single features), all against fp64, on data of several characters, each drawn five times. On a CPU, in a
minute.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from statistics import mean

import torch
from torch import Tensor

from fp8moe.config import TOKEN_TILES, ScaleFormat
from fp8moe.operands import BLOCK, TokenLayout
from fp8moe.quantize import reference
from fp8moe.rows.groups import plan_groups

Draw = Callable[[int, int, torch.Generator], Tensor]
OUTLIER, OUTLIER_CHANNEL, OUTLIER_TOKEN = 50.0, 64, 97
"""How large, and every how many-th."""


def gaussian(num_tokens: int, num_features: int, generator: torch.Generator) -> Tensor:
    """Standard normal."""
    return torch.randn(num_tokens, num_features, generator=generator)


def heavy_tailed(num_tokens: int, num_features: int, generator: torch.Generator) -> Tensor:
    """Student's t with three degrees of freedom."""
    chi_square = torch.randn(3, num_tokens, num_features, generator=generator).square().sum(0)
    return gaussian(num_tokens, num_features, generator) / (chi_square / 3).sqrt()


def outlier_channels(num_tokens: int, num_features: int, generator: torch.Generator) -> Tensor:
    """Normal, some features many times as large."""
    x = gaussian(num_tokens, num_features, generator)
    x[:, ::OUTLIER_CHANNEL] *= OUTLIER
    return x


def outlier_tokens(num_tokens: int, num_features: int, generator: torch.Generator) -> Tensor:
    """Normal, some tokens many times as large: what longer tiles of tokens suffer from most."""
    x = gaussian(num_tokens, num_features, generator)
    x[::OUTLIER_TOKEN] *= OUTLIER
    return x


DATA: dict[str, Draw] = {
    "Gaussian": gaussian,
    "heavy-tailed": heavy_tailed,
    "outlier channels": outlier_channels,
    "outlier tokens": outlier_tokens,
}


@dataclass(frozen=True)
class Accuracy:
    """Of one weight gradient `(N, K)` against fp64, in dB."""

    total: float
    worst_row: float
    """Of one output feature."""
    worst_column: float
    """Of one input feature."""


def gradients(x: Tensor, dout: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`(N, K)` in fp64 by each recipe, from `(M, K)` and `(M, N)` of one expert."""
    offs = torch.tensor([len(x)], dtype=torch.int32)
    groups = plan_groups(offs, len(x))

    def tiles(data: Tensor, format_: ScaleFormat, token_tile: int) -> Tensor:
        tokens = reference.quantize_tokens(data, groups, format_, TokenLayout.SIDE_BY_SIDE, token_tile)
        return reference.dequantize_tokens(tokens, groups).double()

    d = tiles(dout, ScaleFormat.FP32, BLOCK)
    for token_tile in TOKEN_TILES:
        yield f"tiles of {token_tile}", d @ tiles(x, ScaleFormat.FP32, token_tile).t()
    pow2_d, pow2_x = (tiles(data, ScaleFormat.POW2, BLOCK) for data in (dout, x))
    yield "tiles of 128, POW2", pow2_d @ pow2_x.t()
    yield "128 x 128 blocks of activations", d @ _in_blocks(x)
    yield "128 x 128 blocks of both", _in_blocks(dout).t() @ _in_blocks(x)


def accuracy(gradient: Tensor, exact: Tensor) -> Accuracy:
    """Signal to noise."""
    signal, noise = exact.square(), (gradient - exact).square()

    def decibels(dims: tuple[int, ...]) -> float:
        return float(10 * (signal.sum(dims) / noise.sum(dims)).log10().min())

    return Accuracy(decibels((0, 1)), decibels((1,)), decibels((0,)))


def measure(draw_x: Draw, draw_dout: Draw, num_tokens: int, n: int, k: int, draws: int = 5) -> dict[str, Accuracy]:
    """Of each recipe, the mean over several draws: of few outlier channels one alone says little."""
    found: dict[str, list[Accuracy]] = {}
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        x, dout = draw_x(num_tokens, k, generator).bfloat16(), draw_dout(num_tokens, n, generator).bfloat16()
        exact = dout.double().t() @ x.double()
        for name, gradient in gradients(x.float(), dout.float()):
            found.setdefault(name, []).append(accuracy(gradient, exact))
    return {
        name: Accuracy(*(mean(values) for values in zip(*map(astuple, drawn), strict=True)))
        for name, drawn in found.items()
    }


def _in_blocks(x: Tensor) -> Tensor:
    """fp64 `(M, K)`, quantized in blocks of 128 tokens x 128 features and back."""
    num_tokens, num_features = x.shape
    blocks = x.view(num_tokens // BLOCK, BLOCK, num_features // BLOCK, BLOCK)
    data, scale = reference.quantize_tiles(blocks, (1, 3), ScaleFormat.FP32)
    return (data.double() * scale.double()).view(num_tokens, num_features)


def main() -> None:
    """Print the table."""
    from rich.table import Table

    from fp8moe.bench.tables import make_console

    table = Table(title="weight gradient against fp64: dB in all, of the worst row, of the worst column")
    table.add_column("activations, output gradient")
    for x_kind, dout_kind in ((x, dout) for x in DATA for dout in ("Gaussian", "heavy-tailed")):
        measured = measure(DATA[x_kind], DATA[dout_kind], num_tokens=4096, n=512, k=512)
        if not table.rows:
            for name in measured:
                table.add_column(name, justify="right")
        cells = (f"{a.total:.1f} {a.worst_row:.1f} {a.worst_column:.1f}" for a in measured.values())
        table.add_row(f"{x_kind}, {dout_kind}", *cells)
    make_console().print(table)


if __name__ == "__main__":
    main()
