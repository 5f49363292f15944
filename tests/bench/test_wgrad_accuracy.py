"""What longer token tiles cost, in the words of the documentation: little, and less than coarser blocks do."""

import pytest

from benchmarks.wgrad_accuracy import DATA, measure


@pytest.mark.parametrize("dout", ["Gaussian", "heavy-tailed"])
@pytest.mark.parametrize(
    ("x", "loss_of_256", "loss_of_512"),
    [
        ("Gaussian", 0.15, 0.2),
        ("heavy-tailed", 0.3, 0.4),
        ("outlier channels", 0.3, 0.4),
        ("outlier tokens", 1.0, 1.8),
    ],
)
def test_long_tiles_are_little_worse_than_short_ones_and_no_worse_than_blocks(
    x: str, loss_of_256: float, loss_of_512: float, dout: str
) -> None:
    found = {name: one.total for name, one in measure(DATA[x], DATA[dout], num_tokens=2048, n=256, k=256).items()}
    assert found["tiles of 256"] >= found["tiles of 128"] - loss_of_256
    assert found["tiles of 512"] >= found["tiles of 128"] - loss_of_512
    assert min(found["tiles of 256"], found["tiles of 512"]) >= found["128 x 128 blocks of activations"] - 0.3
    assert min(found.values()) >= 28.2
