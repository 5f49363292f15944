"""What longer token tiles cost, in the words of the documentation: little, and less than coarser blocks do."""

import pytest

from fp8moe.bench.wgrad_accuracy import DATA, measure


@pytest.mark.parametrize("dout", ["Gaussian", "heavy-tailed"])
@pytest.mark.parametrize(
    ("x", "loss_of_256", "loss_of_512"),
    [
        ("Gaussian", 0.2, 0.3),
        ("heavy-tailed", 0.4, 0.6),
        ("outlier channels", 0.5, 0.5),  # few channels make up the whole: chance counts for more
        ("outlier tokens", 1.0, 2.0),
    ],
)
def test_long_tiles_are_between_short_ones_and_blocks(
    x: str, loss_of_256: float, loss_of_512: float, dout: str
) -> None:
    found = {name: one.total for name, one in measure(DATA[x], DATA[dout], num_tokens=4096, n=512, k=512).items()}
    assert found["tiles of 256"] >= found["tiles of 128"] - loss_of_256
    assert found["tiles of 512"] >= found["tiles of 128"] - loss_of_512
    assert min(found["tiles of 256"], found["tiles of 512"]) >= found["128 x 128 blocks of activations"] - 0.15
    assert min(found.values()) >= 28.4
